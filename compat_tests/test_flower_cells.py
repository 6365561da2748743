"""The matrix: real federated runs, each checked against a plain loop in torch, and refusals."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from fedpara_plugins import Ledger, LedgerEntry
from harness.cells.base import Cell
from harness.cells.environments import environment, installed_version, selection
from harness.cells.flower import cells
from harness.cells.refusals import refusal
from harness.flower.apps import Experiment, Outcome, federate, plugin_apps
from harness.matrix.cell_runs import plain_loop, private_names, run, section
from harness.matrix.checks import check_cell, check_close, check_refused, check_same_weights
from harness.matrix.results import CellResult
from harness.oracles.cell_model import cell_model
from harness.oracles.plain_loop import RULES, PlainResult, descend_clipped, run_plain_loop
from harness.oracles.task import TrainingTask


def _params() -> list[object]:
    return [
        pytest.param(cell, id=cell.id, marks=getattr(pytest.mark, cell.strategy))
        for cell in cells(environment(), selection())
    ]


@pytest.mark.parametrize("cell", _params())
def test_cell(cell: Cell, result: CellResult, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    refused = refusal(cell, installed_version())
    if refused is not None:
        result.refused_by = refused.by
        check_refused(run(cell, ledger, raises=False), refused)
        return
    outcome = run(cell, ledger)
    assert not [line for line in outcome.log if "left out" in line or "far outside" in line]
    plain = plain_loop(cell)
    entries = Ledger.read(ledger)
    _note(result, outcome, plain, entries)
    check_cell(cell, outcome, plain, entries)


@pytest.mark.in_turn
@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("method", ["none", "pfedpara"])
def test_clients_that_are_away_most_rounds(method: str, codec: str) -> None:
    """Two of four a round: each comes back to other weights than it held."""
    cell = Cell("flower", environment(), "fedavg", method, codec)
    task = TrainingTask(rounds=6)
    experiment = Experiment(task, "fedavg", {"fraction_train": 0.5, "fraction_evaluate": 0.5})
    outcome = federate(plugin_apps(experiment), section(cell))
    asked = [sent for sent in outcome.sent if (sent.direction, sent.kind) == ("down", "train")]
    chosen = [[s.partition for s in asked if s.round == r] for r in range(1, task.rounds + 1)]
    assert all(len(clients) == 2 for clients in chosen)
    assert len({tuple(clients) for clients in chosen}) > 2
    plain = run_plain_loop(
        task,
        partial(cell_model, method, cell.model),
        RULES["fedavg"](),
        private_names=private_names(cell),
        participants=chosen,
        training=descend_clipped(method),
    )
    if codec == "none":
        check_same_weights(outcome, plain, cell)
    else:
        check_close(outcome, plain, cell)


# Figures -----------------------------------------------------------------------------------------


def _note(
    result: CellResult, outcome: Outcome, plain: PlainResult, entries: list[LedgerEntry]
) -> None:
    up, down = (
        [entry for entry in entries if entry.direction == direction] for direction in ("up", "down")
    )
    encoded = sum(entry.encoded_bytes for entry in entries)
    result.note(
        accuracy=outcome.accuracies[-1],
        reference_accuracy=plain.accuracies[-1],
        client_accuracy=list(outcome.client_accuracies.values())[-1],
        bytes_up=sum(entry.encoded_bytes for entry in up),
        bytes_down=sum(entry.encoded_bytes for entry in down),
        ratio_to_dense=sum(entry.dense_bytes for entry in entries) / encoded,
        max_difference=max(
            float((value.double() - plain.state[key]).abs().max())
            for key, value in outcome.state.items()
        ),
    )
