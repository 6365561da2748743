"""The files of a Flower run: who may read them, who may use them, and disks that refuse them."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.support import Keeper, announced_run, hold_state_dir, started_at
from fedpara_plugins_flower.client import storage
from fedpara_plugins_flower.server import app
from harness.cells.flower import GAMMA
from harness.flower.apps import Experiment, Outcome, federate, plugin_apps
from harness.oracles.task import TrainingTask
from harness.processes.refusing_disk import refuse_writes

TASK = TrainingTask(rounds=2, epochs=1)

HOLDER = """
import sys
from pathlib import Path
from fedpara_plugins.support import hold_state_dir
hold = hold_state_dir(Path(sys.argv[1]), run="another", role="server")
print("held", flush=True)
sys.stdin.readline()
"""


def _section(folder: Path, **more: Any) -> dict[str, Any]:
    paths = {
        "state-dir": folder / "state",
        "client-checkpoints": folder / "own",
        "checkpoint": folder / "server.safetensors",
        "ledger": folder / "run.jsonl",
    }
    options = {"method": "pfedpara", "codec": "small", "gamma": GAMMA}
    options.update({name: str(path) for name, path in paths.items()})
    return {f"fedpara.{name}": value for name, value in {**options, **more}.items()}


def _run(folder: Path, *, raises: bool = True, **more: Any) -> Outcome:
    return federate(plugin_apps(Experiment(TASK)), _section(folder, **more), raises=raises)


def _modes(folder: Path) -> tuple[set[int], set[int]]:
    """Return the modes of the folders and of the files there, the folder's own too."""
    found = [folder, *folder.rglob("*")]
    modes = [(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in found]
    return {m for is_dir, m in modes if is_dir}, {m for is_dir, m in modes if not is_dir}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    _run(folder)
    return folder


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """Return a folder with the files of a run that has ended."""
    return Path(shutil.copytree(finished_run, tmp_path / "finished"))


@pytest.mark.parametrize(("references", "umask"), [("client", 0o000), ("grid", 0o022)])
def test_private_state_is_its_owner_s_alone_and_open_files_are_closed(
    tmp_path: Path, request: pytest.FixtureRequest, umask: int, references: str
) -> None:
    request.addfinalizer(partial(os.umask, os.umask(umask)))
    _run(tmp_path, references=references)
    for private in ("state", "own"):
        assert _modes(tmp_path / private) == ({0o700}, {0o600})
    public = 0o666 & ~umask
    for name in ("server.safetensors", "run.jsonl"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == public
    for path in (*(tmp_path / "state").rglob("*"), *(tmp_path / "own").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    from fedpara_plugins.exchange import run_checkpoints

    run_checkpoints._seen.clear()  # as a new process
    (tmp_path / "state" / "server" / "rounds-0.safetensors").unlink()
    outcome = _run(tmp_path, references=references)
    for private in ("state", "own"):
        assert _modes(tmp_path / private) == ({0o700}, {0o600})
    assert any("were open to other users" in line for line in outcome.log)


def test_what_killed_writers_left_is_removed(finished: Path) -> None:
    left = [
        finished / "state" / "server" / "rounds-0.safetensors.99-ab.partial",
        finished / "state" / "server" / "references" / "states" / "ab.tmp",
        finished / "state" / "clients" / ".tmpX1y2Z3",
        finished / "own" / "client-3.safetensors.99-ab.partial",
        finished / "server.safetensors.99-ab.partial",
    ]
    for path in left:
        path.write_bytes(b"half")
    from fedpara_plugins.exchange import run_checkpoints

    run_checkpoints._seen.clear()
    _run(finished)
    # The run is over already: no client has evaluated, and nothing was exported.
    assert [path.name for path in left if path.exists()] == ["client-3.safetensors.99-ab.partial"]
    (finished / "state" / "server" / "rounds-0.safetensors").unlink()
    _run(finished)
    assert not left[3].exists()


def test_a_second_run_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "state")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError) as refused:
            _run(tmp_path)
        for fact in ("run another", socket.gethostname(), f"process {holder.pid}", "state-dir"):
            assert fact in str(refused.value)
        # A client on a machine of its own meets it as well.
        config = _section(tmp_path)
        del config["fedpara.state-dir"]
        outcome = federate(
            plugin_apps(Experiment(TASK)), config, client_config=_section(tmp_path), raises=False
        )
        assert "run another" in str(outcome.error)
    finally:
        holder.kill()
        holder.communicate()
    assert _run(tmp_path).accuracies


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="asks /proc, which Linux alone has"
)
def test_a_run_that_goes_on_keeps_the_state_between_its_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are runs of one SuperLink, whose servers see each other, and of one SuperNode."""
    node = Keeper(os.getppid(), started_at(os.getppid()) or "", "a:1", "a SuperNode of a:1")
    monkeypatch.setattr(storage, "_supernode", lambda: node)
    monkeypatch.setattr(app, "superlink_of_this_process", lambda: "a:1")
    hold_state_dir(tmp_path / "state", run="another", keeper=node).release()
    server = _section(tmp_path)
    del server["fedpara.state-dir"]
    apps = plugin_apps(Experiment(TASK))

    def run() -> Outcome:
        return federate(apps, server, client_config=_section(tmp_path), raises=False)

    with announced_run("another", "a:1"):
        said = str(run().error)
    for fact in ("run another", socket.gethostname(), f"process {node.pid} (a SuperNode of a:1)"):
        assert fact in said
    assert "wait until that run has ended" in said
    assert run().accuracies  # it has


def test_a_disk_that_refuses_costs_what_was_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(tmp_path / "whole")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    refuse_writes(monkeypatch, tmp_path / "full")
    outcome = _run(tmp_path / "full", raises=False)
    assert isinstance(outcome.error, FedParaError)
    assert "checkpoint" in str(outcome.error)
    for name, value in whole.state.items():
        torch.testing.assert_close(outcome.state[name], value, atol=1e-6, rtol=0)
    assert outcome.accuracies == pytest.approx(whole.accuracies)
    told = {
        "the lock of the state-dir", "the ledger", "completed rounds", "metrics of the rounds",
        "the table of what clients hold", "references", "the checkpoint",
    }  # fmt: skip
    for what in told:
        lines = [line for line in outcome.log if f"{what} cannot be written" in line]
        assert lines, what
        assert "(No space left on device)" in lines[0] or "disk is full" in lines[0]
    for what in ("a client's state", "a client's checkpoint"):
        lines = [line for line in outcome.log if f"{what} cannot be written" in line]
        assert len(lines) == TASK.clients
    last = outcome.log[-1]
    assert "not or not wholly written in this run" in last
    for what in told:
        assert f"{what} at " in last
    (offered,) = elsewhere.rglob("*.safetensors")
    assert str(offered) in str(outcome.error)
    expected = load_file(tmp_path / "whole" / "server.safetensors")
    for name, value in load_file(offered).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def test_a_round_that_was_kept_before_the_disk_was_full_is_gone_on_from(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a read-only disk holds is read."""
    with monkeypatch.context() as patch:
        refuse_writes(patch, finished)
        outcome = _run(finished, raises=False)
    assert any("holds round 2 of 2" in line for line in outcome.log)
    assert len(outcome.accuracies) == 0


def _make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _make_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("odd", [_make_folder, _make_loop, _damage])
def test_an_odd_snapshot_is_named(finished: Path, odd: Any) -> None:
    path = finished / "state" / "server" / "rounds-0.safetensors"
    odd(path)
    with pytest.raises(ConfigError, match=str(path)):
        _run(finished)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[1]", b'{"train_metrics_clientapp": 3}', b"[" * 10_000,
     b'{"train_metrics_clientapp": {"x": {}}}', b'{"train_metrics_clientapp": {"1": [3]}}'],
)  # fmt: skip
def test_metrics_that_cannot_be_read_are_told_and_begin_anew(
    finished: Path, content: bytes
) -> None:
    path = finished / "state" / "server" / "rounds-0.metrics.json"
    path.write_bytes(content)
    outcome = _run(finished)
    assert any(f"are lost: {path} cannot be read" in line for line in outcome.log)


@pytest.mark.parametrize("odd", [_make_folder, _make_loop])
def test_an_odd_file_of_a_client_costs_that_client_alone(finished: Path, odd: Any) -> None:
    (finished / "state" / "server" / "rounds-0.safetensors").unlink()
    path = finished / "state" / "clients" / "2.sqlite"
    odd(path)
    outcome = _run(finished)
    assert any(str(path) in line for line in outcome.log)
    assert len(outcome.accuracies) == TASK.rounds + 1


@pytest.mark.parametrize("place", ["", "server", "clients", "server/references"])
def test_a_file_in_a_folder_s_place_is_named(tmp_path: Path, place: str) -> None:
    path = tmp_path / "state" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    with pytest.raises(ConfigError, match=str(path)):
        _run(tmp_path)
