"""The same run over each of FedML's transports, and in one process, gives the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpara_plugins import Ledger
from harness.cells.transports import TRANSPORT_CELLS, TransportCell
from harness.fedml.deployment import FedMLDeployment, accuracy
from harness.fedml.requirements import skip_without
from harness.matrix.results import CellResult

ROUNDS = 4
CLIENTS = 2
Single = Callable[[TransportCell], FedMLDeployment]


def engine_of(folder: Path, backend: str, cell: TransportCell, **options: Any) -> FedMLDeployment:
    """Return a cell's run over a transport, or in the single process (``sp``)."""
    train = {"learning_rate": 0.1, "comm_round": ROUNDS, "client_num_in_total": cell.silos}
    common = {"training_type": "simulation" if backend == "sp" else cell.mode}
    return FedMLDeployment(
        folder, backend, plugin=cell.plugin, train=train, common=common, **options
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Single:
    """Run a cell in one process; cells that differ in their transport alone share the run."""
    known: dict[tuple[str, str, int], FedMLDeployment] = {}

    def finished(cell: TransportCell) -> FedMLDeployment:
        key = cell.method, cell.codec, cell.silos
        if key not in known:
            with engine_of(tmp_path_factory.mktemp("single") / "run", "sp", cell) as engine:
                engine.finished()
            known[key] = engine
        return known[key]

    return finished


def check_learned(engine: FedMLDeployment, rounds: int) -> None:
    """Assert by the server's log that each round was tested, and the last is above chance."""
    log = engine.text("server")
    results = [line for line in log.splitlines() if "metric_result_in_current_round" in line]
    assert len(results) == rounds
    assert float(results[-1].partition("(")[2].partition(",")[0]) > 0.2


@pytest.mark.parametrize("cell", TRANSPORT_CELLS, ids=lambda cell: cell.id)
def test_the_transport_makes_no_difference(
    tmp_path: Path, cell: TransportCell, result: CellResult, single: Single
) -> None:
    """Bit for bit: nothing that a transport does may touch a number."""
    skip_without(cell.transport)
    with engine_of(tmp_path, cell.transport, cell) as engine:
        engine.finished()
        entries = list(Ledger.read(engine.ledger))
    dense, encoded = (sum(getattr(e, f"{k}_bytes") for e in entries) for k in ("dense", "encoded"))
    result.note(accuracy=accuracy(engine.final), ratio_to_dense=dense / encoded)
    alone = single(cell)
    assert engine.final.keys() == alone.final.keys()
    for key, value in alone.final.items():
        assert torch.equal(engine.final[key], value), key
    if cell.method != "pfedpara":  # its server's model is W1 alone
        check_learned(engine, ROUNDS)
    assert all(entry.encoded_bytes > 0 for entry in entries)
    if cell.mode == "cross_silo":
        by = {way: [e for e in entries if e.direction == way] for way in ("up", "down")}
        # Each round a message each way for each client, and the last model; nothing is sent twice.
        assert (len(by["up"]), len(by["down"])) == (ROUNDS * CLIENTS, (ROUNDS + 1) * CLIENTS)
    else:
        check_silos(engine, alone, private=cell.method == "pfedpara")


def check_silos(mpi: FedMLDeployment, single: FedMLDeployment, *, private: bool) -> None:
    """Assert that five silos on two processes equal those of one process, each with its own."""
    noted = sorted(path.name for path in mpi.notes.iterdir())
    assert noted == sorted(path.name for path in single.notes.iterdir())
    if not private:
        return
    # A silo that comes again begins with the private factors that it ended with.
    seen: dict[str, int] = {}
    again = 0
    for number in range(1, ROUNDS + 1):
        for silo in {name.split("-")[0] for name in noted if name.split("-")[1] == str(number)}:
            if silo in seen:
                before = mpi.noted(int(silo), number, "before")
                after = mpi.noted(int(silo), seen[silo], "after")
                assert torch.equal(before["hidden.x2"], after["hidden.x2"])
                again += 1
            seen[silo] = number
    assert again >= 3
