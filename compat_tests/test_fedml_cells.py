"""The matrix on FedML: real runs in its single process, each against the published algorithm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from torch import Tensor, nn

from fedpara_plugins import ConfigError, Ledger, LedgerEntry, ModelSpec, convert, split
from harness.cells.base import Cell
from harness.cells.environments import environment, selection
from harness.cells.fedml import FEDML, HIERARCHICAL, fedml_cells
from harness.cells.flower import GAMMA
from harness.cells.strategies import RATE
from harness.fedml.project import Outcome, run
from harness.fedml.task_dataset import task_dataset, task_keys
from harness.matrix.results import CellResult
from harness.oracles.cell_model import SLOW
from harness.oracles.fedml_rules import ALGORITHMS, PlainLoop
from harness.oracles.task import TrainingTask, evaluate

TOLERANCE = 1e-5
"""Of a weight over two rounds; both compute in float32 and sum up in another order."""

ACCURACY = 0.02
"""8 of 400 images."""


def _params() -> list[object]:
    return [
        pytest.param(cell, id=cell.id, marks=getattr(pytest.mark, cell.strategy))
        for cell in fedml_cells(environment(), selection())
    ]


@pytest.mark.parametrize("cell", _params())
def test_cell(
    cell: Cell, result: CellResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if cell.strategy == HIERARCHICAL:
        _check_refused(cell, result)
        return
    task, ledger = task_of(cell), tmp_path / "ledger.jsonl"
    outcome = federated(cell, fedpara_ledger=str(ledger))
    lines = [record.getMessage() for record in caplog.records]
    assert not [line for line in lines if "left out" in line or "far outside" in line]
    wanted = plain_loop(cell.strategy, cell.method, cell.model)
    entries = Ledger.read(ledger)
    encoded = sum(entry.encoded_bytes for entry in entries)
    result.note(
        accuracy=accuracy(cell, outcome.state, task.test_data()),
        reference_accuracy=accuracy(cell, wanted.sent(wanted.x), task.test_data()),
        client_accuracy=_own(cell, lambda client: outcome.kept(client)),
        ratio_to_dense=sum(entry.dense_bytes for entry in entries) / encoded,
    )
    _check_bytes(cell, outcome, entries)
    _check_private(cell, outcome)
    _check_weights(cell, outcome, wanted)
    figures = result.figures
    assert figures["accuracy"] >= figures["reference_accuracy"] - ACCURACY
    of_clients = _own(cell, lambda client: {**wanted.sent(wanted.x), **wanted.own[client]})
    assert figures["client_accuracy"] == pytest.approx(of_clients, abs=ACCURACY)
    assert loss(cell, outcome.state) < loss(cell, built(cell).state_dict())


def task_of(cell: Cell) -> TrainingTask:
    """Return the task, as on Flower: short, but every optimizer uses its memory once."""
    return TrainingTask(model=cell.model, rounds=2, epochs=1, batch_size=40, lr=RATE)


def built(cell: Cell) -> nn.Module:
    """Build the cell's model with the task's initial weights."""
    torch.manual_seed(task_of(cell).seed)
    return convert(task_of(cell).net(), method=cell.method, gamma=GAMMA, **SLOW)


def federated(cell: Cell, **more: Any) -> Outcome:
    """Run the cell."""
    spec, task = FEDML[cell.strategy], task_of(cell)
    torch.manual_seed(task.seed)
    keys: dict[str, Any] = {
        **task_keys(task),
        "federated_optimizer": spec.optimizer,
        "fedpara_mend": True,
        "fedpara_method": cell.method,
        "fedpara_codec": cell.codec,
        "fedpara_gamma": GAMMA,
        **{f"fedpara_{key}": value for key, value in SLOW.items()},
        **spec.keys,
    }
    return run(net=task.net(), data=task_dataset(task), **{**keys, **more})


@cache
def plain_loop(strategy: str, method: str, model: str) -> PlainLoop:
    """Run the published algorithm to its end."""
    cell, spec = Cell("fedml", "", strategy, method, "none", model), FEDML[strategy]
    task, net = task_of(cell), built(cell)

    class OfTask(ALGORITHMS[spec.algorithm or spec.optimizer]):  # type: ignore[misc]
        def batches(self, client: int) -> Any:
            return list(task.batches(client, self.number + 1))

        def size(self, client: int) -> int:
            return task.size(client)

    keys = {k: v for k, v in spec.keys.items() if not k.startswith("fedpara_")}
    made: PlainLoop = OfTask(
        net,
        dict.fromkeys(range(task.clients), ()),
        private=ModelSpec.of(net).initial_private(),
        lr=keys.pop("learning_rate", task.lr),
        **{**keys, **spec.more},
    )
    made.run(task.rounds, task.clients)
    return made


def accuracy(cell: Cell, state: Mapping[str, Tensor], data: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy of the server's model (private factors at zero) or of a client's."""
    return _scores(cell, state, data)[1]


def loss(cell: Cell, state: Mapping[str, Tensor]) -> float:
    """Return the loss of the server's model on the server's images."""
    return _scores(cell, state, task_of(cell).test_data())[0]


def _scores(
    cell: Cell, state: Mapping[str, Tensor], data: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    model = built(cell)
    zero = {name: torch.zeros_like(model.state_dict()[name]) for name in split(model).private}
    model.load_state_dict({**zero, **state})
    return evaluate(model, data)


def _own(cell: Cell, state_of: Any) -> float:
    """Return the mean accuracy of the clients' own models on their held-out images."""
    task = task_of(cell)
    each = [accuracy(cell, state_of(c), task.held_out(c)) for c in range(task.clients)]
    return sum(each) / len(each)


def _check_weights(cell: Cell, outcome: Outcome, wanted: PlainLoop) -> None:
    state = wanted.sent(wanted.x)
    assert state.keys() <= outcome.state.keys()
    assert bool(outcome.state.keys() - state.keys()) == (cell.method == "pfedpara")
    if cell.exact:
        for name, value in state.items():
            far = float((outcome.state[name].double() - value.double()).abs().max())
            assert far <= TOLERANCE, f"{name} is off by {far:.1e}"
        return
    floats = [name for name, value in state.items() if value.is_floating_point()]
    way = distance(state, wanted.like, floats)
    assert distance(outcome.state, state, floats) <= FEDML[cell.strategy].lost * way


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: list[str]) -> float:
    """Return the Euclidean distance over all tensors named."""
    return float(sum(((a[n].double() - b[n].double()) ** 2).sum() for n in names) ** 0.5)


def _check_bytes(cell: Cell, outcome: Outcome, entries: list[LedgerEntry]) -> None:
    """Assert that the ledger's bytes are the messages', by round, direction and client."""
    counted: Counter[tuple[object, ...]] = Counter()
    for sent in outcome.sent:
        counted[sent.direction, sent.round, sent.client] += len(sent.data)
    booked: Counter[tuple[object, ...]] = Counter()
    for entry in entries:
        booked[entry.direction, entry.round, entry.client] += entry.encoded_bytes
    assert booked == counted
    assert len(counted) == 2 * task_of(cell).rounds * task_of(cell).clients


def _check_private(cell: Cell, outcome: Outcome) -> None:
    """Assert that clients kept what is private; `run` has searched what left them for it."""
    expected = set(split(built(cell)).private)
    assert outcome.kept_private.names == expected
    if expected:
        outcome.kept_private.check_control(outcome.traffic, raw=cell.codec == "none")


def _check_refused(cell: Cell, result: CellResult) -> None:
    """Assert FedML's own error (docs/fedml-faults.md), or the plugin's refusal if it is on."""
    task = task_of(cell)
    keys = {**task_keys(task), "federated_optimizer": "HierarchicalFL"}
    groups = {"group_method": "random", "group_num": 1, "group_comm_round": 1}
    if cell.plain:
        result.refused_by = "FedML"
        with pytest.raises(AttributeError, match="lr"):
            run(net=task.net(), data=task_dataset(task), plain=True, **keys, **groups)
        return
    result.refused_by = "plugin"
    with pytest.raises(ConfigError, match="HierarchicalFL"):
        run(net=task.net(), data=task_dataset(task), fedpara_method="fedpara", **keys, **groups)
