"""A SuperNode is killed while its client trains, and started again: the run goes on."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

import fedpara_plugins as fedpara
from harness.deployment import deployment
from harness.engine_app import EngineApp
from harness.processes import wait_until

ROUNDS = 4
KILLED = 2
"""Round in which it happens."""

State = dict[str, Tensor]


def test_a_killed_supernode_loses_its_private_factors_and_this_is_said(tmp_path: Path) -> None:
    app = EngineApp(
        tmp_path, method="pfedpara", codec="balanced", rounds=ROUNDS, options={"pause": 4}
    )
    with deployment(tmp_path / "run") as engine:
        run = engine.submit(app.path, app.config)
        wait_until(
            lambda: app.noted(1, KILLED, "before") is not None,
            seconds=600,
            what=f"client 1 trains in round {KILLED}",
        )
        engine.nodes[1].kill()
        engine.start_node(1)
        finished = engine.finish(run).check()
    rounds = _trained(finished.log)
    assert [number for number, _, _ in rounds] == list(range(1, ROUNDS + 1))
    # The round completes with the other one, and nobody else is lost.
    assert rounds[KILLED - 1][1:] == (1, 1)
    assert rounds[-1][1:] == (2, 0)
    for server_round in range(2, ROUNDS + 1):
        assert _same(_private(app, 0, server_round, "before"), _private(app, 0, server_round - 1))
    # The one that was killed is back, starts anew, and the log counts it.
    back = min(r for r in range(KILLED + 1, ROUNDS + 1) if app.noted(1, r, "before"))
    assert _same(_private(app, 1, back, "before"), _private(app, 1, 1, "before"))
    assert not _same(_private(app, 1, back, "before"), _private(app, 1, 1))
    said = re.findall(r"fedpara: (\d+) clients started from the seeded private", finished.log)
    assert said == ["2", "1"]
    assert app.figures["losses"][-1] < app.figures["losses"][0]


def _trained(log: str) -> list[tuple[int, int, int]]:
    """Of each round: its number, results and failures of the training."""
    found = re.findall(
        r"\[ROUND (\d+)/.*?aggregate_train: Received (\d+) results and (\d+) failures", log, re.S
    )
    return [(int(number), int(results), int(failures)) for number, results, failures in found]


def _private(app: EngineApp, client: int, server_round: int, when: str = "after") -> State:
    state = app.noted(client, server_round, when)
    assert state is not None, (client, server_round, when)
    return {name: state[name] for name in fedpara.split(app.build()).private}


def _same(one: State, other: State) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())
