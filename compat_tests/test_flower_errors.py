"""Errors that a user meets when something is wrong: what to change, and when they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpara_plugins as fedpara
from fedpara_plugins.exchange import client_round
from fedpara_plugins.exchange.coding import CodedRecord
from fedpara_plugins.exchange.outgoing import Outgoing
from harness.cells.flower import GAMMA
from harness.cells.strategies import STRATEGIES
from harness.flower.apps import Apps, Experiment, Hooks, Outcome, federate, plugin_apps
from harness.flower.inprocess_grid import Engine, Sent
from harness.flower.legacy_apps import LegacyExperiment, legacy_plugin_apps
from harness.oracles.plain_loop import RULES, PlainResult, run_plain_loop
from harness.oracles.task import TrainingTask

TASK = TrainingTask(rounds=3, epochs=1)


def plugin_experiment(**lines: frozenset[str]) -> Apps:
    return plugin_apps(Experiment(TASK), **lines)


def legacy_experiment(**lines: frozenset[str]) -> Apps:
    return legacy_plugin_apps(LegacyExperiment(TASK), **lines)


BOTH = frozenset({"net", "app"})
NEITHER: frozenset[str] = frozenset()
NET, APP = frozenset({"net"}), frozenset({"app"})


def _section(method: str = "fedpara", codec: str = "none", **options: Any) -> dict[str, Any]:
    chosen = {"method": method, "codec": codec, "gamma": GAMMA, **options}
    return {f"fedpara.{key}": value for key, value in chosen.items()}


# Bad options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "fedparra"}, ["method", "'fedparra'", "none, lowrank, fedpara, pfedpara"]),
        ({"gamma": 7}, ["gamma", "from 0 to 1", "7"]),
        ({"gamma": "much"}, ["gamma", "'much'"]),
        ({"codec": "int9"}, ["codec", "'int9'", "int8"]),
        ({"codec": "int8+delta"}, ["codec", "delta", "before"]),
        ({"gama": 0.3}, ["gama", "gamma"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_bad_option_ends_the_run_before_the_first_message(
    options: dict[str, Any], says: list[str]
) -> None:
    outcome = federate(plugin_apps(Experiment(TASK)), _section(**options), raises=False)
    assert isinstance(outcome.error, fedpara.ConfigError)
    for text in says:
        assert text in str(outcome.error)
    assert not outcome.sent


# Lines that are missing --------------------------------------------------------------------------

MISSING_LINES = [
    # lines of the client, of the server, method, codec, what the error says
    (NEITHER, BOTH, "fedpara", "none", "client_mod]"),
    (NEITHER, BOTH, "none", "int8", "client_mod]"),
    (NEITHER, BOTH, "pfedpara", "int8", "client_mod]"),
    (NET, BOTH, "fedpara", "none", "client_mod]"),
    (NET, BOTH, "none", "int8", "client_mod]"),
    (BOTH, NET, "fedpara", "none", "server_app(ServerApp())"),
    (BOTH, APP, "fedpara", "none", "Net = fedpara.factorised(Net)"),
    (BOTH, APP, "pfedpara", "int8", "Net = fedpara.factorised(Net)"),
    (APP, BOTH, "fedpara", "none", "Net = fedpara.factorised(Net)"),
]


@pytest.mark.parametrize(("client", "server", "method", "codec", "says"), MISSING_LINES)
def test_a_missing_line_ends_the_run_in_its_first_round(
    client: frozenset[str], server: frozenset[str], method: str, codec: str, says: str
) -> None:
    apps = plugin_apps(Experiment(TASK), client=client, server=server)
    outcome = federate(apps, _section(method, codec), raises=False)
    assert isinstance(outcome.error, fedpara.FedParaError)
    assert says in str(outcome.error)
    assert {(sent.round, sent.kind) for sent in outcome.sent} <= {(1, "train")}


@pytest.mark.in_turn
@pytest.mark.parametrize(("method", "codec"), [("fedpara", "none"), ("none", "int8")])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_the_plugin_on_the_server_the_clients_end_the_run_and_say_why(
    strategy: str, method: str, codec: str
) -> None:
    """Nothing of the plugin runs on that server: what its strategy reads has to tell it."""
    task = replace(TASK, clients=STRATEGIES[strategy].clients)
    apps = plugin_apps(Experiment(task, strategy), server=NEITHER)
    outcome = federate(apps, _section(method, codec), raises=False)
    assert "app = fedpara.server_app(ServerApp())" in str(outcome.error)
    assert {sent.round for sent in outcome.sent} == {1}
    assert not outcome.state


@pytest.mark.parametrize("engine", ["simulation", "deployment"])
@pytest.mark.parametrize("lines", [NEITHER, NET], ids=["no-line", "mod-missing"])
@pytest.mark.parametrize("make", [plugin_experiment, legacy_experiment])
def test_a_missing_mod_is_said_of_a_client_with_the_line_to_add_there(
    make: Callable[..., Apps], lines: frozenset[str], engine: Engine
) -> None:
    """Whoever lacks the mod is not sent to the server's file."""
    outcome = federate(make(client=lines), _section("pfedpara"), engine=engine, raises=False)
    said = str(outcome.error)
    add = "Add to the client: app = ClientApp(mods=[fedpara.client_mod])"
    nodes = [outcome.grid.node_id(client) for client in range(TASK.clients)]
    assert any(f"ode {node} " in said[: said.index(add)] for node in nodes)
    assert "client" in said[: said.index(add)]
    assert "server_app" not in said


def test_a_server_without_its_line_is_not_sent_to_the_clients() -> None:
    apps = plugin_apps(Experiment(TASK), server=NET)
    outcome = federate(apps, _section(), raises=False)
    assert "Add to the server: app = fedpara.server_app(ServerApp())" in str(outcome.error)
    assert "client_mod" not in str(outcome.error)


def test_what_the_plugin_needs_is_both_lines_of_both_sides() -> None:
    """The control for all of the above."""
    outcome = federate(plugin_apps(Experiment(TASK), client=BOTH, server=BOTH), _section())
    assert outcome.error is None
    assert outcome.losses[-1] < outcome.losses[0]


# Two sides that differ ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"gamma": 0.5}, ["conv2.weight", "rank 8", "rank 7", "same fedpara options"]),
        ({"method": "lowrank"}, ["lowrank", "fedpara", "same fedpara options"]),
        ({"exclude": "fc1"}, ["fc1.weight", "dense", "same fedpara options"]),
        ({"codec": "int8"}, ["codec differs", "int8", "has none", "same fedpara option codec"]),
        ({"uplink_codec": "small"}, ["codec differs", "down none", "same fedpara option codec"]),
    ],
    ids=["gamma", "method", "exclude", "codec", "uplink-codec"],
)
@pytest.mark.parametrize("engine", ["simulation", "deployment"])
def test_different_options_on_the_two_sides_end_the_run_in_its_first_round(
    engine: Engine, theirs: dict[str, Any], says: list[str]
) -> None:
    outcome = federate(
        plugin_apps(Experiment(TASK)),
        _section(),
        client_config=_section(**theirs),
        engine=engine,
        raises=False,
    )
    assert isinstance(outcome.error, fedpara.FedParaError)
    for text in says:
        assert text in str(outcome.error)
    assert {(sent.round, sent.kind) for sent in outcome.sent} == {(1, "train")}


# A client that fails in a round ------------------------------------------------------------------

CULPRIT, ROUND = 1, 2


def _raising(model: nn.Module, client: int, server_round: int) -> None:
    if (client, server_round) == (CULPRIT, ROUND):
        raise RuntimeError("no space left on device")


def _diverging(model: nn.Module, client: int, server_round: int) -> None:
    if (client, server_round) == (CULPRIT, ROUND):
        with torch.no_grad():
            model.get_parameter("fc2.weight")[3, 5] = float("nan")


FAILURES: dict[str, tuple[Callable[[nn.Module, int, int], None], str]] = {
    "raises": (_raising, "no space left on device"),
    "nan": (_diverging, "'fc2.weight' holds 1 NaN"),
}


@pytest.mark.in_turn
@pytest.mark.parametrize("engine", ["simulation", "deployment"])
@pytest.mark.parametrize(("method", "codec"), [("pfedpara", "none"), ("pfedpara", "int8")])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_client_is_left_out_of_that_round_only(
    failure: str, method: str, codec: str, engine: Engine
) -> None:
    trained, says = FAILURES[failure]
    outcome = _one_fails(trained, method, codec, engine)
    _check_named(outcome, says)
    _check_as_without_the_client(outcome, method, codec)


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_a_client_that_sends_nan_all_the_same_is_left_out(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server does not rely on the client's own check."""
    monkeypatch.setattr(client_round, "check_finite", lambda *args, **kwargs: None)
    outcome = _one_fails(_diverging, "fedpara", codec)
    _check_named(outcome, "'fc2.weight' holds 1 NaN")
    _check_as_without_the_client(outcome, "fedpara", codec)


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_a_client_that_sends_damaged_bytes_is_left_out(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now: list[tuple[int, int]] = []
    encode: Callable[..., CodedRecord] = vars(client_round)["encode_record"]

    def damaging(*args: Any, **kwargs: Any) -> CodedRecord:
        coded = encode(*args, **kwargs)
        if now[-1] != (CULPRIT, ROUND):
            return coded
        return replace(coded, payload=coded.payload[:-1] + bytes([coded.payload[-1] ^ 1]))

    def noting(model: nn.Module, client: int, server_round: int) -> None:
        now.append((client, server_round))

    monkeypatch.setattr(client_round, "encode_record", damaging)
    outcome = _one_fails(noting, "fedpara", codec)
    _check_named(outcome, "checksum")
    _check_as_without_the_client(outcome, "fedpara", codec)


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_a_client_that_sends_another_shape_is_left_out(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its payload is sound, and no strategy can average what is in it with the others' replies."""
    now: list[tuple[int, int]] = []
    encode: Callable[..., CodedRecord] = vars(client_round)["encode_record"]

    def other(record: Outgoing, **kwargs: Any) -> CodedRecord:
        if now[-1] == (CULPRIT, ROUND):
            record = replace(record, shared={**record.shared, "fc2.bias": torch.zeros(3)})
        return encode(record, **kwargs)

    def noting(model: nn.Module, client: int, server_round: int) -> None:
        now.append((client, server_round))

    monkeypatch.setattr(client_round, "encode_record", other)
    outcome = _one_fails(noting, "fedpara", codec)
    _check_named(outcome, "'fc2.bias' of shape (3,), this server sent it with shape (10,)")
    _check_as_without_the_client(outcome, "fedpara", codec)


@pytest.mark.parametrize(("method", "codec"), [("fedpara", "none"), ("pfedpara", "small")])
def test_a_client_that_does_not_answer_in_time_is_left_out_and_named(
    method: str, codec: str
) -> None:
    def late(sent: Sent) -> bool:
        return (sent.kind, sent.partition, sent.round) == ("train", CULPRIT, ROUND)

    # Seeded factors would make the first copy small.
    section = _section(method, codec, init="auto" if codec == "none" else "random")
    outcome = federate(plugin_apps(Experiment(TASK)), section, late=late)
    _check_named(outcome, "has not answered in time")
    if method == "fedpara":
        _check_as_without_the_client(outcome, method, codec)
    # It goes on in the next round where both sides know it to be: no second copy of the model.
    after = [s for s in outcome.sent if (s.partition, s.direction) == (CULPRIT, "down")]
    first, *others = [s.array_bytes for s in after]
    assert codec == "none" or max(others) < first / 2
    assert outcome.losses[-1] < outcome.losses[0]


@pytest.mark.parametrize("checked_by", ["client", "server"])
@pytest.mark.parametrize(("method", "codec"), [("pfedpara", "none"), ("none", "small")])
def test_nan_on_every_client_is_told_as_what_it_is(
    method: str, codec: str, checked_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as an app that lacks the plugin's lines, since none of its clients could be used."""

    def diverging(model: nn.Module, client: int, server_round: int) -> None:
        with torch.no_grad():
            model.get_parameter("fc2.weight")[3, 5] = float("nan")

    if checked_by == "server":
        monkeypatch.setattr(client_round, "check_finite", lambda *args, **kwargs: None)
        codec = codec if method != "none" else "lossless"  # a lossy one cannot even code it
    apps = plugin_apps(Experiment(TASK, hooks=Hooks(trained=diverging)))
    outcome = federate(apps, _section(method, codec), raises=False)
    said = str(outcome.error)
    assert isinstance(outcome.error, fedpara.FedParaError)
    assert "'fc2.weight' holds 1 NaN or infinite values of 640" in said
    if checked_by == "server":
        assert "set the fedpara option clip = relative where none is set" in said
    elif method == "none":  # the relative clip bounds factors, and there are none
        assert "clip gradients in your own training loop" in said
    else:
        assert "set the fedpara option clip = relative. If" in said
    assert any(f"ode {outcome.grid.node_id(n)}" in said for n in range(TASK.clients))
    for misleading in ("mods=", "client_mod", "Add to", "without the plugin"):
        assert misleading not in said
    assert {(sent.round, sent.kind) for sent in outcome.sent} == {(1, "train")}


def _one_fails(
    trained: Callable[[nn.Module, int, int], None],
    method: str,
    codec: str,
    engine: Engine = "simulation",
) -> Outcome:
    apps = plugin_apps(Experiment(TASK, hooks=Hooks(trained=trained)))
    return federate(apps, _section(method, codec), engine=engine)


def _check_named(outcome: Outcome, says: str) -> None:
    """Assert that one line, in that round, names the node and the reason."""
    begin, end = (
        next(i for i, line in enumerate(outcome.log) if f"[ROUND {n}" in line)
        for n in (ROUND, ROUND + 1)
    )
    node = f"node {outcome.grid.node_id(CULPRIT)}"
    naming = [i for i, line in enumerate(outcome.log) if node in line and says in line]
    assert len(naming) == 1
    assert begin < naming[0] < end


def _check_as_without_the_client(outcome: Outcome, method: str, codec: str) -> None:
    """Assert the weights of a plain loop where that client sits out that round.

    With int8, at least nearer to that loop than to the one where it takes part.
    With ``pfedpara`` this holds only if the failed reply left no trace in the client's private
    factors either: it goes on from those of its last good round.
    """
    plain = _reference(method)
    everyone = _reference(method, missing=False)
    shared = fedpara.split(_build(method)).shared
    off = _distance(outcome.state, plain.state, shared)
    missing = _distance(everyone.state, plain.state, shared)
    assert off <= (
        1e-5 if codec != "int8" else 0.05 * _distance(plain.state, plain.initial, shared)
    )
    assert off < 0.5 * missing
    assert len(outcome.losses) == TASK.rounds + 1


def _build(method: str) -> nn.Module:
    return fedpara.convert(TASK.net(), method=method, gamma=GAMMA)


def _reference(method: str, *, missing: bool = True) -> PlainResult:
    everyone = list(range(TASK.clients))
    others = [client for client in everyone if client != CULPRIT]
    return run_plain_loop(
        TASK,
        partial(_build, method),
        RULES["fedavg"](),
        private_names=fedpara.split(_build(method)).private,
        participants=[everyone, others if missing else everyone, everyone],
    )


def _distance(a: dict[str, Tensor], b: dict[str, Tensor], keys: dict[str, Tensor]) -> float:
    return float(sum(((a[key].double() - b[key].double()) ** 2).sum() for key in keys) ** 0.5)
