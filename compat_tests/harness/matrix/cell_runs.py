"""A cell's federated run, and the plain loop that it is compared with."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

import fedpara_plugins as fedpara
from harness.cells.base import Cell
from harness.cells.flower import GAMMA
from harness.cells.strategies import RATE, STRATEGIES
from harness.flower.apps import Experiment, Outcome, federate, plugin_apps
from harness.oracles.cell_model import cell_model
from harness.oracles.plain_loop import RULES, PlainResult, descend_clipped, run_plain_loop
from harness.oracles.task import TrainingTask

__all__ = ["plain_loop", "private_names", "run", "section", "shared", "task_of"]

COUNTERS = "num_batches_tracked"


def task_of(cell: Cell) -> TrainingTask:
    """Return the cell's training task: short, but every strategy uses its memory once."""
    clients = STRATEGIES[cell.strategy].clients
    return TrainingTask(
        model=cell.model, clients=clients, rounds=2, epochs=1, batch_size=40, lr=RATE
    )


def section(cell: Cell, **more: str) -> dict[str, Any]:
    """Return the cell's config as Flower flattens it, with ``more`` options."""
    # An empty text is the default.
    options = {"method": cell.method, "codec": cell.codec, "clip": "", **more}
    if _keeps_counters(cell):
        options["private"] = f"*{COUNTERS}"
    return {"fedpara.gamma": GAMMA, **{f"fedpara.{key}": text for key, text in options.items()}}


def _keeps_counters(cell: Cell) -> bool:
    """Tell whether BatchNorm's counters stay on the clients: in a norm they outweigh the model."""
    return STRATEGIES[cell.strategy].norms and cell.model == "batchnorm" and not cell.plain


def run(cell: Cell, ledger: Path, *, raises: bool = True) -> Outcome:
    """Run the cell, with its ledger in a file."""
    experiment = Experiment(task_of(cell), cell.strategy)
    return federate(plugin_apps(experiment), section(cell, ledger=str(ledger)), raises=raises)


def plain_loop(cell: Cell) -> PlainResult:
    """Run the plain loop that the cell must match; codecs do not change it."""
    private = frozenset(private_names(cell))
    return _plain_loop(cell.strategy, cell.method, task_of(cell), private)


@cache
def _plain_loop(
    strategy: str, method: str, task: TrainingTask, private: frozenset[str]
) -> PlainResult:
    spec = STRATEGIES[strategy]
    return run_plain_loop(
        task,
        partial(cell_model, method, task.model),
        RULES[spec.rule](**spec.rule_options),
        proximal_mu=spec.proximal_mu,
        private_names=private,
        training=descend_clipped(method),
    )


def private_names(cell: Cell) -> set[str]:
    """Return the names that never leave the clients."""
    model = cell_model(cell.method, cell.model)
    kept = {name for name in model.state_dict() if name.endswith(COUNTERS)}
    return set(fedpara.split(model).private) | (kept if _keeps_counters(cell) else set())


def shared(cell: Cell) -> dict[str, Tensor]:
    """Return the shared part with its initial values."""
    state = cell_model(cell.method, cell.model).state_dict()
    hidden = private_names(cell)
    return {name: value for name, value in state.items() if name not in hidden}
