"""The cells of the plugin's own strategies, against the published algorithms."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedpara_plugins import Ledger, LedgerEntry, split
from harness.cells.base import Cell
from harness.cells.environments import environment, selection
from harness.cells.flower import GAMMA, drift_cells
from harness.cells.strategies import PLUGIN_STRATEGIES
from harness.flower.apps import Outcome, federate
from harness.flower.drift_apps import DriftExperiment, drift_apps
from harness.matrix.checks import distance
from harness.matrix.results import CellResult
from harness.oracles.cell_model import SLOW, cell_model
from harness.oracles.drift import run_published
from harness.oracles.task import TrainingTask

TOLERANCE = 1e-4
"""Of a weight over three rounds; see `test_flower_drift`."""

LOST = 0.1
"""Of the way the plain loop has gone, how far off a lossy codec may end. Twice what the other
strategies are given: variates and duals are coded too, or follow from what is."""


def _params() -> list[object]:
    return [
        pytest.param(cell, id=cell.id, marks=getattr(pytest.mark, cell.strategy))
        for cell in drift_cells(environment(), selection())
    ]


@pytest.mark.parametrize("cell", _params())
def test_cell(cell: Cell, result: CellResult, tmp_path: Path) -> None:
    import fedpara_plugins_flower

    spec, task = PLUGIN_STRATEGIES[cell.strategy], TrainingTask(model=cell.model)
    options = {**spec.options, "guard": None}
    experiment = DriftExperiment(getattr(fedpara_plugins_flower, spec.class_name), options, task)
    ledger = tmp_path / "ledger.jsonl"
    section = {
        "fedpara.method": cell.method,
        "fedpara.codec": cell.codec,
        "fedpara.gamma": GAMMA,
        **{f"fedpara.{key}": value for key, value in SLOW.items()},
        "fedpara.ledger": str(ledger),
    }
    outcome = federate(drift_apps(experiment), section)
    travels, private = split(cell_model(cell.method, cell.model))
    plain = run_published(cell.strategy, cell.method, task, frozenset(private))
    entries = Ledger.read(ledger)
    encoded = sum(entry.encoded_bytes for entry in entries)
    result.note(
        accuracy=outcome.accuracies[-1],
        reference_accuracy=plain.accuracies[-1],
        client_accuracy=list(outcome.client_accuracies.values())[-1],
        ratio_to_dense=sum(entry.dense_bytes for entry in entries) / encoded,
    )
    floats = [name for name, value in travels.items() if value.is_floating_point()]
    assert not [line for line in outcome.log if "left out" in line]
    _check_bytes(outcome, entries, cell)
    if cell.exact:
        for name in travels:
            off = (outcome.state[name].double() - plain.state[name]).abs().max()
            assert float(off) <= TOLERANCE, name
        assert outcome.losses == pytest.approx(plain.losses, abs=2e-3)
    else:
        way = distance(plain.state, plain.initial, floats)
        assert distance(outcome.state, plain.state, floats) <= LOST * way
    assert plain.losses[-1] < plain.losses[0]
    assert outcome.accuracies[-1] >= plain.accuracies[-1] - 0.05


def _check_bytes(outcome: Outcome, entries: list[LedgerEntry], cell: Cell) -> None:
    """Assert that the ledger's bytes are the wire's, variates included."""
    counted: Counter[tuple[object, ...]] = Counter()
    for sent in outcome.sent:
        if sent.arrays:
            counted[sent.direction, sent.round, sent.kind, str(sent.node)] += sent.array_bytes
    booked: Counter[tuple[object, ...]] = Counter()
    for entry in entries:
        booked[entry.direction, entry.round, entry.kind, entry.client] += entry.encoded_bytes
    assert booked == counted
    dense = sum(
        v.numel() * v.element_size()
        for v in TrainingTask(model=cell.model).net().state_dict().values()
    )
    with_variates = dense + sum(
        4 * p.numel() for p in TrainingTask(model=cell.model).net().parameters()
    )
    up = {entry.dense_bytes for entry in entries if entry.direction == "up"}
    assert up == {with_variates if cell.strategy == "scaffold" else dense}
