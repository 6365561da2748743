"""``fedpara doctor`` names what is wrong with a FedML environment before FedML's tracebacks do."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fedpara_plugins_fedml.environment as environment
from fedpara_plugins.cli import environment as core
from fedpara_plugins.cli.command import main
from fedpara_plugins_fedml.plugin import ADAPTER
from harness.matrix.smoke import matrix_only

HEALTHY = {
    "fedml": "0.9.6",
    "setuptools": "80.9.0",
    "numpy": "1.26.4",
    "pandas": "3.0.6",
    "wandb": "0.13.2",
    "protobuf": "3.20.3",
    "paho-mqtt": "1.6.1",
    "requests": "2.31.0",
    "torchvision": "0.16.2",
    "torch": "2.13.0+cpu",
    "mpi4py": "4.1.2",
    "grpcio": "1.85.3",
    **dict.fromkeys(environment.IMPORTED, "1.0"),
}

TORCHVISION = (
    "pip install --no-deps torchvision==0.16.2"
    if sys.version_info < (3, 12)
    else "install the torchvision that belongs to your torch, from where your torch comes"
)
"""0.16.2 was not built for Python 3.12."""

LIGHT = Path(__file__).parents[1] / "adapters" / "fedml" / "requirements-light.txt"

Fake = Callable[..., dict[str, tuple[str, str]]]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """Return findings (level, text) by subject with some versions replaced (None: missing)."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEDML_ENV_VERSION", "local")

    def findings(**changed: str | None) -> dict[str, tuple[str, str]]:
        versions = {**HEALTHY, **{name.replace("_", "-"): v for name, v in changed.items()}}

        def version(name: str) -> str:
            found = versions.get(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(environment, "version", version)
        return {f.subject: (f.level, f.text) for f in environment.findings()}

    return findings


def test_a_healthy_environment_needs_nothing(doctor: Fake) -> None:
    assert {level for level, _ in doctor().values()} == {"ok"}


@pytest.mark.parametrize(
    ("package", "version", "reason", "remedy"),
    [
        ("setuptools", "84.2.1", "pkg_resources", "pip install 'setuptools<82'"),
        ("setuptools", None, "pkg_resources", "pip install 'setuptools<82'"),
        ("numpy", "2.4.6", "np.float_", "pip install 'numpy<2'"),
        ("pandas", "3.1.0", "C extension", "pip install 'pandas<3.1'"),
        ("wandb", "0.19.11", "FedML imports modules of it", "pip install 'wandb==0.13.2'"),
        ("protobuf", "6.33.6", "generated", "pip install 'protobuf>=3.20.2,<4'"),
        ("paho_mqtt", "2.1.0", "argument", "pip install 'paho-mqtt<2'"),
        ("requests", "2.32.3", "docker", "pip install 'requests<2.32'"),
        ("torchvision", None, "FedML imports it", TORCHVISION),
    ],
)
def test_each_pin_is_named_with_its_reason_and_remedy(
    doctor: Fake, package: str, version: str | None, reason: str, remedy: str
) -> None:
    found = doctor(**{package: version})
    wrong = {subject: text for subject, (level, text) in found.items() if level == "attention"}
    assert list(wrong) == [f"FedML needs {package.replace('_', '-')}"]
    (text,) = wrong.values()
    assert text.startswith(version or "not installed")
    assert reason in text
    assert text.endswith(remedy)


def test_packages_of_any_version_that_are_missing(doctor: Fake) -> None:
    level, text = doctor(GPUtil=None, boto3=None)["FedML imports"]
    assert level == "attention"
    assert text.startswith("GPUtil, boto3: not installed")
    assert text.endswith("pip install GPUtil boto3")


def test_it_looks_for_what_the_light_recipe_installs() -> None:
    own = {"pluggy", "safetensors"}  # the doctor looks at the plugin's requirements anyway
    lines = (line.partition("#")[0].strip() for line in LIGHT.read_text().splitlines())
    listed = {re.split("[<>=]", line)[0] for line in lines if line}
    looked_for = {pin.name for pin in environment.PINS} | set(environment.IMPORTED)
    assert looked_for - {"torchvision"} == listed - own


@pytest.mark.parametrize("loads", [True, False])
def test_a_torchvision_that_does_not_load_beside_this_torch(
    doctor: Fake, loads: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Found by loading it in another process, where a package of that name stands in for it."""
    package = tmp_path / "torchvision"
    package.mkdir()
    error = "raise RuntimeError('operator torchvision::nms does not exist')"
    (package / "__init__.py").write_text("" if loads else error)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    level, text = doctor(torchvision="0.28.0")["torchvision beside torch"]
    assert level == ("ok" if loads else "attention")
    if not loads:
        assert "operator torchvision::nms does not exist" in text
        assert text.endswith(TORCHVISION)


@pytest.mark.parametrize(("backend", "package"), [("MPI", "mpi4py"), ("GRPC", "grpcio")])
def test_a_transport_without_its_package(doctor: Fake, backend: str, package: str) -> None:
    level, text = doctor(**{package: None})[f"FedML backend {backend}"]
    assert level == "note"  # another transport may be meant
    assert f"pip install {package}" in text
    assert environment.missing_for(backend) == text
    assert environment.missing_for("TRPC") == ""


@pytest.mark.parametrize("numbers", [(3, 9), (3, 13)])
def test_interpreters(
    doctor: Fake, numbers: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", numbers)
    assert doctor()["FedML and python"][0] == "attention"


def test_what_fedml_contacts(doctor: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file that FedML writes on first use overrides the environment variable."""
    monkeypatch.delenv("FEDML_ENV_VERSION")
    assert "set FEDML_ENV_VERSION=local" in doctor()["FedML and the network"][1]
    monkeypatch.setenv("FEDML_ENV_VERSION", "local")
    assert doctor()["FedML and the network"][0] == "ok"
    kept = tmp_path / ".fedml" / "global_services" / ".env"
    kept.parent.mkdir(parents=True)
    kept.write_text("FEDML_ENV_VERSION='release'\n")
    level, text = doctor()["FedML and the network"]
    assert level == "note"
    assert str(kept) in text
    kept.write_text("FEDML_ENV_VERSION='local'\n")
    assert doctor()["FedML and the network"][0] == "ok"


def test_the_command_says_it_and_imports_no_fedml(
    doctor: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(numpy="2.4.6")  # the versions stay replaced
    monkeypatch.setattr(core, "adapters", lambda: {"fedml": ADAPTER})
    monkeypatch.setattr(core, "entry_points", lambda group: [])
    monkeypatch.setattr(core, "version", environment.version)
    before = "fedml" in sys.modules
    assert main(["doctor"]) == 1
    assert re.search(r"^attention +FedML needs numpy: 2\.4\.6", capsys.readouterr().out, re.M)
    assert ("fedml" in sys.modules) == before


def test_without_fedml_nothing_is_said_of_its_needs(
    doctor: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    doctor(fedml=None, numpy="2.4.6")
    monkeypatch.setattr(core, "version", environment.version)
    subjects = [finding.subject for finding in core._adapter(ADAPTER)]
    assert subjects[0] == "adapter fedml: fedml"
    assert not any(subject.startswith("FedML") for subject in subjects)


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "fedpara_plugins_fedml", "main.py"],
        matrix_only(["-c", "from fedpara_plugins_fedml import *"], reason="the launcher does"),
    ],
    ids=["launcher", "import"],
)
def test_where_fedml_cannot_be_imported_the_reason_is_the_doctor_s(
    tmp_path: Path, command: list[str]
) -> None:
    """A setuptools without pkg_resources, as later ones are."""
    pytest.importorskip("fedml", reason="FedML's own error is what is explained")
    (tmp_path / "main.py").write_text("raise SystemExit('not reached')")
    (tmp_path / "pkg_resources.py").write_text("raise ImportError('No module pkg_resources')")
    dist = tmp_path / "setuptools-84.2.1.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: setuptools\nVersion: 84.2.1\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode not in (0, None)
    first, second = ended.stderr.strip().splitlines()[-2:]
    assert first.endswith("`import fedml` fails: ImportError: No module pkg_resources")
    assert second.strip().startswith("FedML needs setuptools: 84.2.1 does not fit <82")
    assert ("Traceback" in ended.stderr) == ("-c" in command)
