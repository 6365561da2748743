"""A SuperNode that is killed while its client trains, and started again: the run continues."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError
from fedpara_plugins.support import Keeper, hold_state_dir
from harness.flower.deployment import deployment
from harness.flower.engine_app import EngineApp
from harness.processes.supervisor import wait_until

ROUNDS = 3
KILLED = 2
"""Round in which it happens."""

State = dict[str, Tensor]


@pytest.mark.parametrize("kept", ["in the SuperNode", "on disk"])
def test_a_supernode_killed_while_its_client_trains(tmp_path: Path, kept: str) -> None:
    """In its memory private factors are lost, which is said; on disk they are those of the last
    round that it had answered."""
    folder = str(tmp_path / "state") if kept == "on disk" else ""
    options = {"pause": 4, "fedpara.state-dir": folder}
    app = EngineApp(tmp_path, method="pfedpara", codec="balanced", rounds=ROUNDS, options=options)
    with deployment(tmp_path / "run") as engine:
        run = engine.submit(app.path, app.config)
        wait_until(
            lambda: app.noted(1, KILLED, "before") is not None,
            seconds=600,
            what=f"client 1 trains in round {KILLED}",
        )
        if folder:
            check_held(Path(folder), engine.nodes[1].pid)
        engine.nodes[1].kill()
        engine.start_node(1)
        finished = engine.finish(run).check()
    app.check_nothing_private_left()
    rounds = _trained(finished.log)
    assert [number for number, _, _ in rounds] == list(range(1, ROUNDS + 1))
    # The round completes with the other one, and nobody else is lost.
    assert rounds[KILLED - 1][1:] == (1, 1)
    assert rounds[-1][1:] == (2, 0)
    for server_round in range(2, ROUNDS + 1):
        assert _same(_private(app, 0, server_round, "before"), _private(app, 0, server_round - 1))
    back = min(r for r in range(KILLED + 1, ROUNDS + 1) if app.noted(1, r, "before"))
    found = _private(app, 1, back, "before")
    first, last = _private(app, 1, 1, "before"), _private(app, 1, KILLED - 1)
    assert not _same(first, last)
    assert _same(found, last if kept == "on disk" else first)
    said = re.findall(r"fedpara: (\d+) clients started from the seeded private", finished.log)
    assert said[0] == "2"
    assert set(said[1:]) == (set() if kept == "on disk" else {"1"})
    assert app.figures["losses"][-1] < app.figures["losses"][0]


def test_a_second_run_of_one_superlink_is_kept_out_of_the_clients_state(tmp_path: Path) -> None:
    """The first one goes on, and the state is free when it has ended."""
    node = {n: f'fedpara-state-dir="{tmp_path / f"state-{n}"}"' for n in range(2)}
    first, second, third = (
        EngineApp(
            tmp_path / name, method="pfedpara", codec="balanced", rounds=2, options={"pause": pause}
        )
        for name, pause in (("first", 10), ("second", 0), ("third", 0))
    )
    with deployment(tmp_path / "run", node_config=node) as engine:
        run = engine.submit(first.path, first.config)
        wait_until(
            lambda: first.noted(1, 1, "before") is not None,
            seconds=600,
            what="client 1 trains in round 1",
        )
        refused = engine.run(second.path, second.config)
        assert refused.status != "finished:completed"
        # In these words only where the second run's server has seen the first one's.
        said = r"is in use by run \d+, host \S+, process \d+ \(a SuperNode of \S+: refused to run"
        assert re.search(said, refused.log), refused.log[-3000:]
        engine.finish(run).check()
        engine.run(third.path, third.config).check()


def check_held(folder: Path, pid: int) -> None:
    """Assert that a SuperNode holds the state-dir: one of another SuperLink is kept out."""
    keeper = next((folder / "locks").glob(f"*-{pid}.keeper"))
    with pytest.raises(ConfigError, match=f"process {pid} .a SuperNode of 127.0.0.1"):
        hold_state_dir(folder, run="9", keeper=Keeper(os.getpid(), "", "another:1"))
    assert json.loads(keeper.read_text("utf-8"))["pid"] == pid


def _trained(log: str) -> list[tuple[int, int, int]]:
    """Return number, results and failures of each round's training."""
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
