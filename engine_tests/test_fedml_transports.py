"""The same run over each of FedML's transports, and in one process, gives the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpara_plugins import Ledger
from harness.fedml_engine import BACKENDS, FedMLEngine, why_not

PROJECTS: dict[str, dict[str, Any]] = {
    "dense": {"mend": True},
    "fedpara": {"method": "fedpara", "gamma": 0.3, "codec": "balanced"},
    "pfedpara": {"method": "pfedpara", "gamma": 0.3},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "FedProx": {"federated_optimizer": "FedProx", "fedprox_mu": 0.1},
    "FedOpt": {"federated_optimizer": "FedOpt", "server_optimizer": "adam", "server_lr": 0.01},
    "SCAFFOLD": {"federated_optimizer": "SCAFFOLD", "server_lr": 1.0},
    "FedDyn": {"federated_optimizer": "FedDyn", "feddyn_alpha": 0.05},
}

Finals = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def finals() -> Finals:
    """The first transport's weights, by project: what the others are compared with."""
    return {}


def compared(finals: Finals, name: str, final: dict[str, Tensor]) -> None:
    """Bit for bit: nothing that a transport does may touch a number."""
    first = finals.setdefault(name, final)
    assert first.keys() == final.keys()
    for key, value in final.items():
        assert torch.equal(first[key], value), key


def check_learned(engine: FedMLEngine, rounds: int) -> None:
    """By the server's own log: it tested each round, and the last test is better than guessing."""
    log = engine.text("mpirun" if engine.backend == "MPI" else "server")
    results = [line for line in log.splitlines() if "metric_result_in_current_round" in line]
    assert len(results) == rounds
    assert float(results[-1].partition("(")[2].partition(",")[0]) > 0.3


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_transport_makes_no_difference(
    tmp_path: Path, backend: str, project: str, finals: Finals
) -> None:
    if reason := why_not(backend):
        pytest.skip(reason)
    train = {"learning_rate": 0.1, "comm_round": 4}
    with FedMLEngine(tmp_path, backend, plugin=PROJECTS[project], train=train) as engine:
        engine.finished()
        if project != "pfedpara":  # its server's model is W1 alone
            check_learned(engine, 4)
        entries = list(Ledger.read(engine.ledger))
    compared(finals, project, engine.final)
    by = {way: [e for e in entries if e.direction == way] for way in ("up", "down")}
    # Each round a message each way for each client, and the last model; nothing is sent twice.
    assert (len(by["up"]), len(by["down"])) == (4 * 2, 5 * 2)
    assert all(entry.encoded_bytes > 0 for entry in entries)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_that_cross_silo_lacks(tmp_path: Path, optimizer: str) -> None:
    """By the project's own key, for a dense model, without any key of ours."""
    train = {"learning_rate": 0.1, "comm_round": 4, **OPTIMIZERS[optimizer]}
    with FedMLEngine(tmp_path, "TRPC", plugin={}, train=train) as engine:
        engine.finished()
        check_learned(engine, 4)


def test_silos_keep_their_private_state_in_mpi_simulation(tmp_path: Path) -> None:
    """Five silos on two client processes, two a round: weights as in one process."""
    if reason := why_not("MPI"):
        pytest.skip(reason)
    plugin = {"method": "pfedpara", "gamma": 0.3, "codec": "balanced"}
    train = {"learning_rate": 0.1, "comm_round": 5, "client_num_in_total": 5}
    common = {"training_type": "simulation"}
    with FedMLEngine(tmp_path / "mpi", "MPI", plugin=plugin, train=train, common=common) as mpi:
        mpi.finished()
    with FedMLEngine(tmp_path / "sp", "sp", plugin=plugin, train=train, common=common) as single:
        single.start(0)
        assert single.wait() == {"server": 0}, single.programs["server"].tail()
    for key, value in single.final.items():
        assert torch.equal(value, mpi.final[key]), key
    noted = sorted(path.name for path in mpi.notes.iterdir())
    assert noted == sorted(path.name for path in single.notes.iterdir())
    # A silo that comes again begins with the private factors that it ended with.
    seen: dict[str, int] = {}
    again = 0
    for number in range(1, 6):
        for silo in {name.split("-")[0] for name in noted if name.split("-")[1] == str(number)}:
            if silo in seen:
                before = mpi.noted(int(silo), number, "before")
                after = mpi.noted(int(silo), seen[silo], "after")
                assert torch.equal(before["hidden.x2"], after["hidden.x2"])
                again += 1
            seen[silo] = number
    assert again >= 3
