"""Processes that are killed and started again with a state-dir: the run continues."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedpara_plugins as fedpara
from harness.fedml.deployment import FedMLDeployment, Net
from harness.fedml.requirements import skip_without

PLUGIN: dict[str, Any] = {"method": "pfedpara", "gamma": 0.3, "codec": "balanced"}
LIMIT = 600.0
"""Seconds that a run may take to end; nothing is asserted about how long it really takes."""

RETURNING = {**PLUGIN, "timeout": 300}  # longer than a process takes to start


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FedMLDeployment:
    """Run to the end without a kill; every transport gives these weights."""
    skip_without("GRPC")
    folder = tmp_path_factory.mktemp("whole")
    with FedMLDeployment(folder / "run", "GRPC", plugin=RETURNING) as engine:
        engine.finished()
    return engine


@pytest.mark.parametrize(
    ("backend", "when"),
    [
        ("GRPC", "dies"),
        ("GRPC", "dies-in-step"),
        ("GRPC", "dies-late"),
        ("GRPC", "dies-writing"),
        ("MQTT_S3", "dies-late"),
    ],
)
def test_a_client_that_is_started_again_goes_on(
    tmp_path: Path, backend: str, when: str, whole: FedMLDeployment
) -> None:
    """With a state-dir it has its private factors and what its codec had lost: equal weights.

    It is killed when it has loaded the round's model, in the middle of its training, when it has
    trained and all that it keeps has changed in memory, or when that is written and not yet valid.
    """
    skip_without(backend)
    engine = killed_and_started_again(tmp_path, backend, when)
    check_equal(engine.final, whole.final)
    check_private(engine.noted(1, 2, "before"), engine.noted(1, 1, "after"))
    rounds = max(int(path.stem.split("-")[1]) for path in whole.notes.iterdir())
    assert rounds > 2
    check_equal(engine.noted(1, rounds, "after"), whole.noted(1, rounds, "after"))


def test_a_client_that_is_killed_when_all_is_kept_has_the_new_state(
    tmp_path: Path, whole: FedMLDeployment
) -> None:
    """It trains that round once more, from what it then holds: the only other state there is."""
    engine = killed_and_started_again(tmp_path, "GRPC", "dies-written", "after")
    check_private(engine.noted(1, 2, "before"), torch.load(tmp_path / "1-2-after.pt"))
    assert not torch.equal(engine.final["hidden.weight"], whole.final["hidden.weight"])
    # One more training of one client, and nothing else.
    apart = sum(float((engine.final[k] - v).square().sum()) for k, v in whole.final.items())
    assert apart < 0.05 * sum(float(value.square().sum()) for value in whole.final.values())


def killed_and_started_again(
    folder: Path, backend: str, when: str, keep: str = ""
) -> FedMLDeployment:
    """Run to the end with a second client that is killed in its second round and restarted."""
    plugin = {**RETURNING, "state_dir": str(folder / "state")}
    trouble = f"client 2 round 2 {when}"
    with FedMLDeployment(folder / "run", backend, plugin=plugin, trouble=trouble) as engine:
        engine.start_all()
        assert engine.programs["client-2"].wait(LIMIT) == -9
        if keep:
            shutil.copy(engine.notes / f"1-2-{keep}.pt", folder)
        engine.start(2, FEDPARA_TROUBLE="")
        assert set(engine.wait(LIMIT).values()) == {0}, engine.programs["server"].tail()
        assert "left out" not in engine.text("server")
        assert "client 2 is back" in engine.text("server")
    return engine


def check_private(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    private = fedpara.split(fedpara.convert(Net(), method="pfedpara", gamma=0.3)).private
    assert private
    for key in private:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("backend", ["TRPC", "MPI"])
def test_a_run_whose_processes_are_killed_is_started_again(
    tmp_path: Path, backend: str, whole: FedMLDeployment
) -> None:
    """These transports take nobody back. All are started again, with the same state-dir.

    Both clients are killed, in the middle of a training; the server then ends with the reason.
    """
    skip_without(backend)
    plugin = {**PLUGIN, "timeout": 20, "state_dir": str(tmp_path / "state")}
    trouble = "client 1 round 2 dies;client 2 round 2 dies-in-step"
    with FedMLDeployment(tmp_path / "run", backend, plugin=plugin, trouble=trouble) as engine:
        engine.start_all()
        assert all(engine.wait(LIMIT).values())
        assert not engine.checkpoint.exists()
        engine.processes.env["FEDPARA_TROUBLE"] = ""
        engine.finished()
        assert "holds round 1 of 3" in engine.text("server")
    check_equal(engine.final, whole.final)
    for client in (0, 1):
        check_private(engine.noted(client, 2, "before"), engine.noted(client, 1, "after"))


def test_a_server_that_is_started_again_goes_on(tmp_path: Path) -> None:
    """With all its optimizer knows: it is killed when it has all of a round's answers."""
    train = {"comm_round": 4, "federated_optimizer": "FedOpt", "server_optimizer": "adam"}
    train |= {"server_lr": 0.01, "learning_rate": 0.1}
    plugin = {"method": "fedpara", "gamma": 0.3, "timeout": 20}
    with FedMLDeployment(tmp_path / "whole", "TRPC", plugin=plugin, train=train) as uninterrupted:
        uninterrupted.finished()
    plugin["state_dir"] = str(tmp_path / "state")
    trouble = "server round 3 dies"
    with FedMLDeployment(
        tmp_path / "run", "TRPC", plugin=plugin, train=train, trouble=trouble
    ) as engine:
        engine.start_all()
        assert all(engine.wait(LIMIT).values())
        assert not engine.checkpoint.exists()
        engine.processes.env["FEDPARA_TROUBLE"] = ""
        engine.finished()
        assert "holds round 2 of 4" in engine.text("server")
    check_equal(engine.final, uninterrupted.final)


def check_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
