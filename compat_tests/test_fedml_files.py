"""The files of a FedML run: who may read them, who may use them, and disks that refuse them."""

from __future__ import annotations

import logging
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.exchange import run_checkpoints
from fedpara_plugins_fedml import FedMLRunner, FedMLSettings
from fedpara_plugins_fedml.checks.state_dir import hold_for
from harness.fedml.project import Outcome, arguments, dataset, model, run
from harness.processes.refusing_disk import refuse_writes

KEYS = {"fedpara_method": "pfedpara", "fedpara_gamma": 0.3, "fedpara_codec": "small"}

HOLDER = """
import sys
from types import SimpleNamespace
from fedpara_plugins_fedml.checks.state_dir import hold_for
from fedpara_plugins_fedml import FedMLSettings
args = SimpleNamespace(run_id="0", rank=int(sys.argv[2]), fedpara_state_dir=sys.argv[1])
owner = lambda: None
hold_for(owner, FedMLSettings.from_args(args), args, alone=sys.argv[3] == "alone")
print("held", flush=True)
sys.stdin.readline()
"""


def keys(folder: Path, **more: Any) -> dict[str, Any]:
    paths = {
        "fedpara_state_dir": folder / "state",
        "fedpara_client_checkpoints": folder / "own",
        "fedpara_checkpoint": folder / "server.safetensors",
        "fedpara_ledger": folder / "run.jsonl",
    }
    return {**KEYS, **{name: str(path) for name, path in paths.items()}, **more}


def modes(folder: Path) -> tuple[set[int], set[int]]:
    found = [folder, *folder.rglob("*")]
    each = [(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in found]
    return {m for is_dir, m in each if is_dir}, {m for is_dir, m in each if not is_dir}


@pytest.fixture(params=[0o000, 0o022], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_private_state_is_its_owner_s_alone_and_open_files_are_closed(
    tmp_path: Path, umask: int
) -> None:
    run(**keys(tmp_path))
    for private in ("state", "own"):
        assert modes(tmp_path / private) == ({0o700}, {0o600})
    for name in ("server.safetensors", "run.jsonl"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    for path in (*(tmp_path / "state").rglob("*"), *(tmp_path / "own").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    run_checkpoints._seen.clear()  # as a new process
    run(**keys(tmp_path))
    for private in ("state", "own"):
        assert modes(tmp_path / private) == ({0o700}, {0o600})


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    run(**keys(tmp_path))
    left = [
        tmp_path / "state" / "server" / "round.safetensors.99-ab.partial",
        tmp_path / "state" / "clients" / ".tmpX1y2Z3",
        tmp_path / "own" / "client-3.safetensors.99-ab.partial",
        tmp_path / "server.safetensors.99-ab.partial",
    ]
    for path in left:
        path.write_bytes(b"half")
    run_checkpoints._seen.clear()
    run(**keys(tmp_path))
    assert [path.name for path in left if path.exists()] == []


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[int, str], int]]:
    holders = []

    def start(rank: int, alone: str) -> int:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "state"), str(rank), alone],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        holders.append(holder)
        assert holder.stdout is not None
        while (line := holder.stdout.readline()) != "held\n":
            assert line
        return holder.pid

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_a_second_run_is_refused_even_with_the_same_run_id(
    tmp_path: Path, hold: Callable[[int, str], int]
) -> None:
    """FedML's ``run_id`` is 0 in every project that sets none."""
    pid = hold(0, "alone")
    with pytest.raises(ConfigError) as refused:
        run(**keys(tmp_path))
    for fact in ("fedpara_state_dir", "run 0", socket.gethostname(), f"process {pid}"):
        assert fact in str(refused.value)


@pytest.mark.parametrize("rank", [0, 2])
def test_processes_of_one_run_share_it_and_each_rank_is_one_process(
    tmp_path: Path, hold: Callable[[int, str], int], rank: int
) -> None:
    """MPI and cross-silo: server and clients, on one machine or on one network disk."""
    pid = hold(rank, "shared")
    args = arguments(**keys(tmp_path), rank=rank)
    settings = FedMLSettings.from_args(args)
    role = f"client {rank}" if rank else "server"
    with pytest.raises(ConfigError, match=f"process {pid}: refused to a second {role} of run 0"):
        hold_for(args, settings, args, alone=False)
    args.rank = 1
    hold_for(args, settings, args, alone=False).release()
    args.run_id = "1"
    with pytest.raises(ConfigError, match=f"run 0, .* process {pid}"):
        hold_for(args, settings, args, alone=False)


def test_a_run_gives_the_folder_back_when_it_ends_and_when_it_is_dropped(tmp_path: Path) -> None:
    locks = tmp_path / "state" / "locks"
    runner = FedMLRunner(arguments(**keys(tmp_path)), torch.device("cpu"), dataset(), model())
    assert len(list(locks.glob("*.member"))) == 1
    runner.run()
    assert not list(locks.glob("*.member"))
    runner = FedMLRunner(arguments(**keys(tmp_path)), torch.device("cpu"), dataset(), model())
    del runner
    assert not list(locks.glob("*.member"))


def compared(one: Outcome, other: Outcome) -> None:
    for name, value in one.state.items():
        torch.testing.assert_close(other.state[name], value, atol=1e-6, rtol=0)


def test_a_disk_that_refuses_costs_what_was_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(**keys(tmp_path / "whole"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    refuse_writes(monkeypatch, tmp_path / "full")
    caplog.set_level(logging.INFO)
    caplog.clear()
    args = arguments(**keys(tmp_path / "full"))
    runner = FedMLRunner(args, torch.device("cpu"), dataset(), model())
    with pytest.raises(FedParaError, match=r"checkpoint .* could not be written") as failed:
        runner.run()
    for name, value in whole.state.items():
        torch.testing.assert_close(runner.runner.server.state[name], value, atol=1e-6, rtol=0)
    lines = [record.getMessage() for record in caplog.records if "fedpara" in record.name]
    of_server = ("the ledger", "completed rounds", "references", "the checkpoint")
    for what in (*of_server, "a client's state", "a client's checkpoint"):
        assert [line for line in lines if f"{what} cannot be written" in line], what
    last = next(line for line in reversed(lines) if "not wholly written" in line)
    assert all(f"{what} at " in last for what in of_server)
    (offered,) = elsewhere.rglob("*.safetensors")
    assert str(offered) in str(failed.value)
    expected = load_file(tmp_path / "whole" / "server.safetensors")
    for name, value in load_file(offered).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("name", ["server/round.safetensors", "clients/1.sqlite"])
@pytest.mark.parametrize("odd", [make_folder, make_loop])
def test_an_odd_entry_is_named(tmp_path: Path, name: str, odd: Callable[[Path], None]) -> None:
    run(**keys(tmp_path))
    path = tmp_path / "state" / name
    odd(path)
    with pytest.raises(ConfigError, match=str(path)):
        run(**keys(tmp_path, comm_round=6))


def test_a_damaged_round_is_named(tmp_path: Path) -> None:
    run(**keys(tmp_path))
    path = tmp_path / "state" / "server" / "round.safetensors"
    damage(path)
    with pytest.raises(ConfigError, match=f"{path} is damaged"):
        run(**keys(tmp_path))
