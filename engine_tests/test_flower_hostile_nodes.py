"""SuperNodes that are hostile, lack the mod or are set up otherwise: a run goes on without them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from harness.flower.deployment import deployment
from harness.flower.engine_app import EngineApp
from harness.flower.hostile import HOSTILE

COMPAT_TESTS = Path(__file__).parents[1] / "compat_tests"
HOSTILE_NODE, WITHOUT_MOD, OTHERWISE, HONEST = range(4)
PLANS = [
    ["float8", "NaN examples", "an app that raises"],
    ["half a payload", "100 MB of zeros", "a forged type", "no message"],
]
LEFT_OUT = {name: says for name, (_, says) in HOSTILE.items()} | {
    "no message": "Flower cannot read it"
}


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan[0])
def test_a_run_goes_on_without_three_bad_nodes_of_four(tmp_path: Path, plan: list[str]) -> None:
    app = EngineApp(
        tmp_path,
        method="pfedpara",
        clients=4,
        rounds=len(plan),
        component="hostile_client_app",
    )
    paths = [str(COMPAT_TESTS), os.environ.get("PYTHONPATH", "")]
    env = {
        "FEDPARA_HOSTILE": json.dumps({HOSTILE_NODE: plan, WITHOUT_MOD: ""}),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    more = {OTHERWISE: 'fedpara-private="*.bias"'}
    with deployment(tmp_path / "run", nodes=4, env=env, node_config=more) as engine:
        finished = engine.run(app.path, app.config).check()
    rounds = re.split(r"\[ROUND \d+/", finished.log)[1:]
    assert len(rounds) == len(plan)
    for name, log in zip(plan, rounds, strict=True):
        left_out = [line for line in log.splitlines() if "left out" in line]
        failures = 2
        if name in LEFT_OUT:
            assert len(left_out) == 1, (name, left_out)
            assert re.search(LEFT_OUT[name], left_out[0]), (name, left_out)
        else:
            assert not left_out
            failures += 1
            assert "the disk is full" in log
        assert f"aggregate_train: Received 1 results and {failures} failures" in log
    # Of all others, what they share alone has come.
    app.check_nothing_private_left(control=False)
    for number in range(1, len(plan) + 1):
        assert app.noted(HONEST, number, "after") is not None
    assert app.figures["losses"][-1] < app.figures["losses"][0]
