"""Missing programs: the script that installs them, and the reasons of skipped transports."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from harness.cells.transports import BACKENDS
from harness.fedml.requirements import missing_for, skip_without

SCRIPT = Path(__file__).parents[1] / "engine_tests" / "install.sh"


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    path.chmod(0o755)
    return path


def installed(folder: Path, *there: str) -> tuple[str, str]:
    """Run the script where only these programs are; what apt-get and Python were called with.

    A mosquitto in /usr/sbin is found too.
    """
    script = folder / "engine_tests" / "install.sh"
    script.parent.mkdir(exist_ok=True)
    shutil.copy(SCRIPT, script)
    shutil.rmtree(folder / "bin", ignore_errors=True)
    for name in ("dirname", "id", "mkdir", "cp"):
        found = shutil.which(name)
        assert found
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).symlink_to(found)
    for name in there:
        program(folder / "bin" / name, "")
    note = f'echo "$@" >>{folder}'
    program(folder / "bin" / "apt-get", f"{note}/apt")
    program(folder / "bin" / "sudo", '"$@"')
    made = (
        "mkdir -p build/moto/bin && cp $0 build/moto/bin/python && cp $0 build/moto/bin/moto_server"
    )
    program(folder / "bin" / "python3.11", f'{note}/pip\n[ "$2" = pip ] || ({made})')
    env = {"PATH": str(folder / "bin")}
    for name in ("apt", "pip"):
        (folder / name).write_text("")
    subprocess.run([str(script)], env=env, check=True)
    return (folder / "apt").read_text(), (folder / "pip").read_text()


def test_the_script_installs_what_is_missing_and_that_alone(tmp_path: Path) -> None:
    apt, pip = installed(tmp_path, "mosquitto")
    assert apt == "update\ninstall -y openmpi-bin\n"
    assert pip == "-m venv build/moto\n-m pip install -q moto[s3,server]\n"
    assert installed(tmp_path, "mosquitto", "mpirun") == ("", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_why_a_transport_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    for name in ("mpirun", "mosquitto", "moto_server"):
        program(tmp_path / name, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MOTO_SERVER", str(tmp_path / "moto_server"))
    with_all = missing_for(backend)
    assert "install.sh" not in with_all
    for name in ("mpirun", "moto_server"):
        (tmp_path / name).unlink()
    missing = {"MPI": "mpirun", "MQTT_S3": "moto_server"}.get(backend)
    if missing is None:
        assert missing_for(backend) == with_all
    else:
        assert missing_for(backend).startswith(
            f"{backend} needs {missing} (engine_tests/install.sh"
        )


def test_a_test_is_skipped_with_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.fedml.requirements.find_spec", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match=r"GRPC needs grpcio \(pip install grpcio\)"):
        skip_without("GRPC")
    skip_without("TRPC")


def test_a_store_that_is_not_where_it_should_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program(tmp_path / "mosquitto", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MOTO_SERVER", str(tmp_path / "moto_server"))
    assert missing_for("MQTT_S3") == (
        "MQTT_S3 needs moto_server (engine_tests/install.sh installs it; outside of tox, set "
        "MOTO_SERVER to build/moto/bin/moto_server)"
    )


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(tmp_path / "mpirun", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("harness.fedml.requirements.find_spec", lambda name: None)
    assert missing_for("MPI") == "MPI needs mpi4py (pip install mpi4py)"
    assert missing_for("GRPC") == "GRPC needs grpcio (pip install grpcio)"
    assert missing_for("TRPC") == ""
