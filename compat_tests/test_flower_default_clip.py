"""Flower with the options that nobody sets, against a plain loop with the clip written out."""

from __future__ import annotations

from functools import partial

import pytest

from harness.cells.base import Cell
from harness.cells.environments import environment
from harness.flower.apps import Experiment, federate, plugin_apps
from harness.matrix.cell_runs import private_names, section, shared
from harness.matrix.checks import check_same_weights, distance
from harness.oracles.cell_model import cell_model
from harness.oracles.plain_loop import RULES, descend_clipped, run_plain_loop
from harness.oracles.task import TrainingTask

TASK = TrainingTask(rounds=2, epochs=1, batch_size=40, lr=0.2)


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
def test_the_default_clip_is_the_rule_written_out(method: str) -> None:
    cell = Cell("flower", environment(), "fedavg", method, "none")
    plain, free = (
        run_plain_loop(
            TASK,
            partial(cell_model, method, cell.model),
            RULES["fedavg"](),
            private_names=private_names(cell),
            training=training,
        )
        for training in (descend_clipped(method), None)
    )
    floats = list(shared(cell))
    way = distance(plain.state, plain.initial, floats)
    # The rule has acted; without it, pFedPara diverges.
    assert not distance(plain.state, free.state, floats) <= 0.05 * way
    outcome = federate(plugin_apps(Experiment(TASK)), section(cell))
    check_same_weights(outcome, plain, cell)
