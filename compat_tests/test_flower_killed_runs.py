"""With ``state-dir`` a killed run continues where it was: the server, and with it its clients."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from fedpara_plugins import ConfigError
from harness.cells.flower import GAMMA
from harness.flower.apps import Experiment, Hooks, federate, plugin_apps
from harness.flower.inprocess_grid import InProcessGrid, Sent
from harness.flower.killed_run import FlowerRunRequest
from harness.matrix.smoke import matrix_only
from harness.oracles.task import TrainingTask
from harness.processes.killed_runs import ForkServer, assert_equal, assert_little_repeated

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX")

ROUNDS = 4
LESS_KEPT = "what it keeps, another case keeps too"


@pytest.fixture(scope="module")
def program() -> Iterator[ForkServer]:
    made = ForkServer("harness.flower.killed_run")
    yield made
    made.end()


def _section(
    folder: Path | None, method: str = "fedpara", codec: str = "none", **more: Any
) -> dict[str, Any]:
    options = {"method": method, "codec": codec, "gamma": GAMMA, **more}
    if folder is not None:
        options["state-dir"] = str(folder)
    return {f"fedpara.{key}": value for key, value in options.items()}


@pytest.mark.parametrize(
    ("strategy", "options", "method", "codec"),
    [
        matrix_only("fedadam", {}, "fedpara", "none", reason=LESS_KEPT),
        ("fedadam", {}, "pfedpara", "small"),
        matrix_only("fedavg", {}, "none", "small", reason=LESS_KEPT),
        ("Scaffold", {}, "fedpara", "small"),
        matrix_only("FedDyn", {"alpha": 0.3}, "fedpara", "none", reason=LESS_KEPT),
    ],
)
def test_a_run_killed_between_rounds_ends_as_if_it_had_not_been(
    program: ForkServer,
    tmp_path: Path,
    strategy: str,
    options: dict[str, Any],
    method: str,
    codec: str,
) -> None:
    """Moments of the strategy, references, private factors and error feedback all go on."""

    def request(name: str, die_before: int = 0) -> FlowerRunRequest:
        section = _section(tmp_path / name, method, codec)
        output = str(tmp_path / f"{name}.safetensors")
        return FlowerRunRequest(output, section, strategy, options, ROUNDS, die_before=die_before)

    whole = program.run(request("whole"))
    assert program.run(request("killed", die_before=2)) is None
    assert program.run(request("killed", die_before=4)) is None
    assert_equal(program.run(request("killed")), whole)
    log = (tmp_path / "killed.log").read_text()
    assert "holds round 3 of 4" in log
    assert "that lost it" not in log
    assert "seeded private factors" not in log


def test_the_strategy_s_own_state_is_what_makes_them_equal(
    program: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: without its moments, FedAdam ends elsewhere."""

    def request(name: str, die_before: int = 0) -> FlowerRunRequest:
        output = str(tmp_path / f"{name}.safetensors")
        return FlowerRunRequest(
            output, _section(tmp_path / name), "fedadam", {}, ROUNDS, die_before=die_before
        )

    whole = program.run(request("whole"))
    assert program.run(request("killed", die_before=3)) is None
    (rounds,) = (tmp_path / "killed" / "server").glob("rounds-0.safetensors")
    from fedpara_plugins_flower.server.snapshot import Snapshot

    snapshot = Snapshot.read(rounds)
    assert snapshot is not None
    for forgotten in ("m_t", "v_t"):
        assert snapshot.state["attributes"].pop(forgotten)["value"] is not None
    snapshot.write(rounds)
    ended = program.run(request("killed"))
    assert whole is not None
    assert ended is not None
    assert max(float((ended[name] - value).abs().max()) for name, value in whole.items()) > 1e-3


@pytest.mark.parametrize(
    ("method", "codec"),
    [matrix_only("fedpara", "none", reason=LESS_KEPT), ("pfedpara", "small")],
)
def test_a_run_killed_at_any_moment_goes_on(
    program: ForkServer, tmp_path: Path, method: str, codec: str
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    section = _section(tmp_path / "state", method, codec, ledger=str(ledger))
    request = FlowerRunRequest(str(tmp_path / "end.safetensors"), section, "fedadam", {}, ROUNDS)
    draw, killed = random.Random(method), 0
    for _ in range(8):
        moment = {"die_after": draw.randint(1, 30), "moment": draw.uniform(0.0, 0.2)}
        killed += program.run(replace(request, **moment)) is None
    assert killed  # how often, depends on the machine: the first is certain
    state = program.run(request)
    whole = _section(None, method, codec)
    end = str(tmp_path / "whole.safetensors")
    plain = program.run(FlowerRunRequest(end, whole, "fedadam", {}, ROUNDS))
    assert_little_repeated(state, plain, ledger, ROUNDS)


def test_a_finished_folder_gives_its_result_again_and_more_rounds_go_on(tmp_path: Path) -> None:
    def run(rounds: int, folder: Path) -> Any:
        apps = plugin_apps(Experiment(TrainingTask(rounds=rounds, epochs=1), "fedadam"))
        return federate(apps, _section(folder))

    first = run(2, tmp_path / "a")
    again = run(2, tmp_path / "a")
    assert not again.sent
    assert_equal(again.state, first.state)
    assert again.client_accuracies == first.client_accuracies
    longer = run(4, tmp_path / "a")
    assert {sent.round for sent in longer.sent} == {3, 4}
    whole = run(4, tmp_path / "b")
    assert_equal(longer.state, whole.state)
    assert longer.client_accuracies == pytest.approx(whole.client_accuracies)
    assert longer.accuracies == whole.accuracies[3:]  # the earlier ones are in the run before


def test_a_finished_folder_writes_the_checkpoint_again(tmp_path: Path) -> None:
    """Nothing is sent any more that would show the model."""
    task, files = TrainingTask(rounds=1, epochs=1), [tmp_path / "first", tmp_path / "second"]
    for path in files:
        section = _section(tmp_path / "state", checkpoint=str(path))
        federate(plugin_apps(Experiment(task, evaluate_fn=False)), section)
    assert_equal(load_file(files[1]), load_file(files[0]))


@pytest.mark.parametrize(
    ("strategy", "more", "says"),
    [
        ("fedavg", {}, "holds rounds of FedAdam, this run starts FedAvg"),
        ("fedadam", {"gamma": 0.6}, "holds rounds of another model"),
        ("fedadam", {"method": "pfedpara"}, "method fedpara .* there and method pfedpara"),
        ("fedadam", {"tanh": True}, "holds rounds of another model"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    tmp_path: Path, strategy: str, more: dict[str, Any], says: str
) -> None:
    task = TrainingTask(rounds=1, epochs=1)
    federate(plugin_apps(Experiment(task, "fedadam")), _section(tmp_path))
    with pytest.raises(ConfigError, match=says):
        federate(plugin_apps(Experiment(task, strategy)), _section(tmp_path, **more))


def test_a_damaged_round_is_refused_and_said(tmp_path: Path) -> None:
    task = TrainingTask(rounds=1, epochs=1)
    federate(plugin_apps(Experiment(task)), _section(tmp_path))
    path = tmp_path / "server" / "rounds-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is damaged"):
        federate(plugin_apps(Experiment(task)), _section(tmp_path))


def test_a_setting_that_the_user_changed_is_the_user_s(tmp_path: Path) -> None:
    """A learning rate of the server given for the rounds to come is not overwritten."""

    def run(eta: float, rounds: int, folder: Path) -> dict[str, Tensor]:
        options = {"eta": eta}
        apps = plugin_apps(Experiment(TrainingTask(rounds=rounds, epochs=1), "fedadam", options))
        return federate(apps, _section(folder)).state

    before = run(0.05, 1, tmp_path)
    after = run(0.0, 2, tmp_path)  # a server that does not move any more
    assert_equal(after, before)


def test_a_restarted_client_goes_on_with_its_own_file(tmp_path: Path) -> None:
    """``Context.state`` is gone with the SuperNode; the file is not."""
    from fedpara_plugins import split

    before: dict[tuple[int, int], dict[str, Tensor]] = {}
    after: dict[tuple[int, int], dict[str, Tensor]] = {}

    def noted(where: dict[tuple[int, int], dict[str, Tensor]]) -> Any:
        def note(model: Any, client: int, server_round: int) -> None:
            private = split(model).private
            where[client, server_round] = {k: v.detach().clone() for k, v in private.items()}

        return note

    def tap(sent: Sent, grid: InProcessGrid) -> None:
        if (sent.kind, sent.direction, sent.round) == ("train", "down", 2):
            for partition in range(4):
                grid.lose_state(partition)

    hooks = Hooks(loaded=noted(before), trained=noted(after))
    apps = plugin_apps(Experiment(TrainingTask(rounds=2, epochs=1), hooks=hooks))
    outcome = federate(apps, _section(tmp_path, "pfedpara", "small"), tap=tap)
    for client in range(4):
        assert_equal(before[client, 2], after[client, 1])
    assert not [line for line in outcome.log if "that lost it" in line]
    kept = [set(outcome.grid.client_state(p)) for p in range(4)]
    assert all(names <= {"fedpara-options"} for names in kept)  # nothing of the model
    assert len(list((tmp_path / "clients").glob("*.sqlite"))) == 4


def test_a_node_without_a_lasting_name_is_told_how_to_get_one(tmp_path: Path) -> None:
    apps = plugin_apps(Experiment(TrainingTask(rounds=1, epochs=1)))
    grid = InProcessGrid(apps.client, run_config=_section(tmp_path))
    for node in grid._nodes.values():
        node.config = {}
    from harness.flower.apps import Outcome

    with pytest.raises(Exception, match="fedpara-id"):
        grid.serve(apps.server(Outcome(grid)), _section(tmp_path))
