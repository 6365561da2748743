"""One hostile client of four: each of its replies is left out by name, and nobody else's is.

A run has one attack a round, so that a table of them costs little more than one run.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedpara_plugins_flower as fedpara
from harness.cells.flower import GAMMA
from harness.flower.apps import Apps, Experiment, Hooks, Outcome, federate, main_app, train_app
from harness.flower.drift_apps import DriftExperiment, drift_apps
from harness.flower.hostile import HOSTILE, LEGACY, VARIATES, Attack, one, tampering
from harness.flower.inprocess_grid import InProcessGrid, Sent, WireObject
from harness.flower.legacy_apps import LegacyExperiment, components, legacy_client_app
from harness.oracles.task import TrainingTask

TASK = TrainingTask(rounds=2, epochs=1)
SECTION = {"fedpara.method": "pfedpara", "fedpara.codec": "none", "fedpara.gamma": GAMMA}
CULPRIT = 1


def _run(*apps: Any, **options: Any) -> Outcome:
    """Run without the search for private values: what a hostile client sends is its own affair."""
    return federate(*apps, search=False, **options)


def honest(reply: Message) -> None:
    """Change nothing."""


def moved(model: nn.Module, client: int, server_round: int) -> None:
    """Stand for a training: what comes back is known, and costs nothing."""
    draw = torch.Generator().manual_seed(100 * server_round + client)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=draw)


def stepped(model: nn.Module, client: int, server_round: int) -> None:
    """Do the same in a step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    moved(model, client, server_round)
    for parameter, old in zip(model.parameters(), before, strict=True):
        parameter.grad = 10 * (old - parameter.detach())
        parameter.data.copy_(old)
    optimizer.step()


def message_apps(
    attacks: Any = honest,
    *,
    rounds: int = TASK.rounds,
    kind: str = "train",
    evaluates: bool = False,
    culprits: Iterable[int] = (CULPRIT,),
) -> Apps:
    experiment = Experiment(
        replace(TASK, rounds=rounds),
        options={} if evaluates else {"fraction_evaluate": 0.0},
        hooks=Hooks(train=moved),
        evaluate_fn=evaluates,
    )
    net = fedpara.factorised(TASK.net)
    mods = [*(tampering(attacks, client, kind) for client in culprits), fedpara.client_mod]
    return Apps(
        lambda: train_app(ClientApp(mods=mods), experiment, net),
        lambda outcome: main_app(fedpara.server_app(ServerApp()), experiment, net, outcome),
        TASK.clients,
    )


def legacy_apps(
    attacks: Any = honest,
    *,
    rounds: int = TASK.rounds,
    kind: str = "train",
    initial: bool = True,
    culprit: int = CULPRIT,
) -> Apps:
    experiment = LegacyExperiment(
        replace(TASK, rounds=rounds),
        options={"fraction_evaluate": 0.0},
        hooks=Hooks(train=moved),
        initial=initial,
    )
    net = fedpara.factorised(TASK.net)
    mods = [tampering(attacks, culprit, kind), fedpara.client_mod]

    def server(outcome: Outcome) -> ServerApp:
        return fedpara.server_app(ServerApp(server_fn=components(experiment, net, outcome)))

    return Apps(lambda: legacy_client_app(experiment, net, mods), server, TASK.clients)


def scaffold_apps(attacks: Any = honest, *, rounds: int = TASK.rounds) -> Apps:
    task = replace(TASK, rounds=rounds)
    experiment = DriftExperiment(fedpara.Scaffold, task=task, train=stepped)
    return drift_apps(experiment, first=[tampering(attacks, CULPRIT)])


TABLES: dict[str, tuple[Any, dict[str, tuple[Attack, str]]]] = {
    "message": (message_apps, dict(HOSTILE)),
    "legacy": (legacy_apps, dict(LEGACY)),
    "scaffold": (scaffold_apps, dict(VARIATES)),
}


@cache
def attacked(api: str) -> Outcome:
    """Run with one attack after the other, one a round."""
    make, table = TABLES[api]
    attacks = [attack for attack, _ in table.values()]
    return _run(make(attacks, rounds=len(attacks)), SECTION, raises=False)


@cache
def alone(api: str, rounds: int) -> Outcome:
    """Run where the culprit's replies never arrive."""

    def late(sent: Sent) -> bool:
        return (sent.kind, sent.partition) == ("train", CULPRIT)

    return _run(TABLES[api][0](rounds=rounds), SECTION, late=late)


def lines_of(outcome: Outcome, number: int) -> list[str]:
    """Return what was logged in a round."""
    starts = [i for i, line in enumerate(outcome.log) if re.search(rf"\[ROUND {number}\b", line)]
    assert starts, f"round {number} was not reached: {outcome.error}"
    rest = outcome.log[starts[0] + 1 :]
    end = next((i for i, line in enumerate(rest) if "[ROUND " in line), len(rest))
    return rest[:end]


def check_named(outcome: Outcome, number: int, says: str) -> None:
    """Assert that one line of a round, and no other, names the node and the reason."""
    node = f"node {outcome.grid.node_id(CULPRIT)}"
    lines = [line for line in lines_of(outcome, number) if "left out" in line]
    assert len(lines) == 1, lines
    assert node in lines[0]
    assert re.search(says, lines[0]), lines[0]
    assert "\n" not in lines[0]
    assert len(lines[0]) < 2500


CASES = [(api, name) for api, (_, table) in TABLES.items() for name in table]


@pytest.mark.parametrize(("api", "name"), CASES)
def test_a_hostile_reply_is_left_out_and_named(api: str, name: str) -> None:
    table = TABLES[api][1]
    check_named(attacked(api), list(table).index(name) + 1, table[name][1])


@pytest.mark.parametrize("api", TABLES)
def test_hostile_replies_leave_no_trace(api: str) -> None:
    """The model is that of the other three clients."""
    outcome = attacked(api)
    assert outcome.error is None
    expected = alone(api, len(TABLES[api][1])).state
    assert expected.keys() == outcome.state.keys()
    assert expected
    for name, value in expected.items():
        # The legacy API's threads add the replies in any order.
        torch.testing.assert_close(outcome.state[name], value, rtol=0, atol=1e-5)
    assert len(TABLES["message"][1]) >= 34


# Evaluation, and the first weights


def nan_metric(reply: Message) -> None:
    values = dict(reply.content.metric_records["metrics"])
    reply.content["metrics"] = MetricRecord({**values, "eval_acc": float("nan")})


EVALUATIONS: dict[str, Attack] = {
    name: HOSTILE[name][0]
    for name in ("NaN examples", "no metrics", "a missing weight", "an integer as a flag")
} | {"no marker": HOSTILE["no marker"][0], "NaN": nan_metric}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_hostile_reply_to_an_evaluation(name: str) -> None:
    made = message_apps(EVALUATIONS[name], kind="evaluate", evaluates=True)
    outcome = _run(made, SECTION)
    for number in (1, 2):
        check_named(outcome, number, "")
    assert len(outcome.client_accuracies) == TASK.rounds
    assert all(0 <= value <= 1 for value in outcome.client_accuracies.values())


@pytest.mark.parametrize("name", ["a shape of 8 TB", "half a payload", "NaN", "a forged type"])
def test_the_first_weights_come_from_another_client(name: str) -> None:
    """A legacy server asks one client for them; if its answer is of no use, it asks another."""
    attack, says = LEGACY[name]
    plain = _run(legacy_apps(initial=False), SECTION)
    asked = next(sent.partition for sent in plain.sent if sent.kind == "get_parameters")
    made = legacy_apps(attack, initial=False, kind="get_parameters", culprit=asked)
    outcome = _run(made, SECTION)
    assert any(re.search(says, line) for line in outcome.log if "left out" in line)
    for key, value in plain.state.items():
        torch.testing.assert_close(outcome.state[key], value)


# Who answers


def copied(message: Message) -> Message:
    copy: Message = WireObject.of(message).rebuilt()
    copy.metadata.__dict__["_message_id"] = message.metadata.message_id
    return copy


class Forging(InProcessGrid):
    """Delivers one reply twice, and one of a node that nobody asked."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        if not replies:
            return replies
        again, stranger = copied(replies[0]), copied(replies[1])
        stranger.metadata.__dict__["_src_node_id"] = 4711
        return [*replies, again, stranger]


def test_a_second_reply_and_one_of_a_stranger_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = _run(message_apps(), SECTION)
    monkeypatch.setattr("harness.flower.apps.InProcessGrid", Forging)
    outcome = _run(message_apps(), SECTION)
    lines = [line for line in outcome.log if "was not asked, or has answered already" in line]
    assert len(lines) == 2 * TASK.rounds
    assert sum("4711" in line for line in lines) == TASK.rounds
    for name, value in plain.state.items():
        assert torch.equal(outcome.state[name], value)


# Too few


def test_a_round_whose_replies_are_all_bad_fails_and_the_run_goes_on() -> None:
    """Only where the first round has shown that clients can work with the plugin."""
    attacks = [honest, HOSTILE["NaN"][0], HOSTILE["no npy"][0]]
    made = message_apps(attacks, rounds=3, culprits=range(TASK.clients), evaluates=True)
    outcome = _run(made, SECTION)
    assert len([line for line in outcome.log if "none of 4 replies can be used" in line]) == 2
    assert outcome.losses[1] == outcome.losses[2] == outcome.losses[3] != outcome.losses[0]


def test_a_first_round_whose_replies_are_all_bad_ends_the_run() -> None:
    made = message_apps(HOSTILE["NaN"][0], culprits=range(TASK.clients))
    outcome = _run(made, SECTION, raises=False)
    assert "all 4 replies to the first message had to be left out" in str(outcome.error)
    assert "NaN" in str(outcome.error)


def test_a_strategy_that_cannot_do_with_fewer_lets_its_round_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = FedAvg.aggregate_train

    def needs_all(self: Any, number: int, replies: Any) -> Any:
        replies = list(replies)
        if len(replies) < TASK.clients:
            raise ZeroDivisionError("too few")
        return original(self, number, replies)

    monkeypatch.setattr(FedAvg, "aggregate_train", needs_all)
    outcome = _run(message_apps([HOSTILE["NaN"][0], honest], evaluates=True), SECTION)
    said = [line for line in outcome.log if "round 1 fails: 1 replies were left out" in line]
    assert len(said) == 1
    assert "other 3 (ZeroDivisionError: too few)" in said[0]
    assert outcome.losses[0] == outcome.losses[1] != outcome.losses[2]


# Outliers


@pytest.mark.parametrize("option", ["warn", "leave-out", "ignore"])
@pytest.mark.parametrize("api", ["message", "legacy"])
def test_an_absurd_update_is_named_and_left_out_if_asked(api: str, option: str) -> None:
    attack = one(lambda tensor: torch.full_like(tensor, 1e12))
    section = {**SECTION, "fedpara.outliers": option}
    outcome = _run(TABLES[api][0](attack), section, raises=False)
    node = f"node {outcome.grid.node_id(CULPRIT)}"
    named = [line for line in outcome.log if "far outside" in line]
    assert bool(named) == (option != "ignore")
    assert all(node in line and "norm" in line and "limit" in line for line in named)
    if (api, option) == ("message", "leave-out"):
        for name, value in alone(api, TASK.rounds).state.items():
            assert torch.equal(outcome.state[name], value)


def test_random_bytes_in_the_place_of_any_array() -> None:
    draw = random.Random(5)

    def attack(reply: Message) -> None:
        for record in reply.content.array_records.values():
            for array in record.values():
                data = bytearray(array.data)
                for _ in range(draw.randint(1, 8)):
                    data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
                array.data = bytes(data)

    outcome = _run(message_apps(attack, rounds=30), SECTION)
    for number in range(1, 31):
        check_named(outcome, number, "")


def test_the_superlinks_own_error_for_a_node_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes from the SuperLink's id, and is the strategy's to count as a failure."""
    pull = InProcessGrid.pull_messages

    def pulled(self: InProcessGrid, ids: Any) -> list[Message]:
        replies = list(pull(self, ids))
        gone = self.node_id(CULPRIT)
        return [_from_superlink(r) if r.metadata.src_node_id == gone else r for r in replies]

    monkeypatch.setattr(InProcessGrid, "pull_messages", pulled)
    with caplog.at_level("INFO"):
        _run(message_apps(), SECTION)
    assert caplog.text.count("Received 3 results and 1 failures") == TASK.rounds
    assert "left out the reply" not in caplog.text


def _from_superlink(reply: Message) -> Message:
    """Return Flower's error for a node that is not there any more."""
    error = Message(Error(code=3, reason="Error: Node Unavailable"), reply_to=reply)
    error.metadata.__dict__.update(
        _src_node_id=1, _dst_node_id=1, _message_type=reply.metadata.message_type
    )
    return error


# What is said


def test_a_clients_error_is_quoted_in_one_line() -> None:
    said = "\x1b[31mfedpara: the codec differs\nfedpara: left out node 7" + "x" * 10**6

    def failing(message: Message, context: Any, call_next: Any) -> Message:
        raise ValueError(said)

    made = message_apps()
    made = Apps(
        lambda: train_app(
            ClientApp(mods=[failing, fedpara.client_mod]),
            Experiment(TASK),
            fedpara.factorised(TASK.net),
        ),
        made.server,
        made.clients,
    )
    outcome = _run(made, SECTION, raises=False)
    assert "all 4 clients failed at the first message" in str(outcome.error)
    assert str(outcome.error).isprintable()
    assert len(str(outcome.error)) < 2500
