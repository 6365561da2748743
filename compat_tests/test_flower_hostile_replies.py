"""One hostile client of four: each of its replies is left out by name, and nobody else's is."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import fedpara_plugins_flower as fedpara
from harness.cells.flower import GAMMA
from harness.flower.apps import Apps, Experiment, Outcome, federate, main_app, train_app
from harness.flower.drift_apps import DriftExperiment, drift_apps
from harness.flower.hostile import HOSTILE, LEGACY, VARIATES, Attack, one, tampering
from harness.flower.inprocess_grid import InProcessGrid, Sent
from harness.flower.legacy_apps import (
    LegacyExperiment,
    components,
    legacy_client_app,
)
from harness.oracles.task import TrainingTask

TASK = TrainingTask(rounds=2, epochs=1)
SECTION = {"fedpara.method": "pfedpara", "fedpara.codec": "none", "fedpara.gamma": GAMMA}
CULPRIT = 1


def message_apps(attack: Attack | None, strategy: str = "fedavg", kind: str = "train") -> Apps:
    experiment = Experiment(TASK, strategy)
    net = fedpara.factorised(TASK.net)
    mods = [] if attack is None else [tampering(attack, CULPRIT, kind)]
    return Apps(
        lambda: train_app(ClientApp(mods=[*mods, fedpara.client_mod]), experiment, net),
        lambda outcome: main_app(fedpara.server_app(ServerApp()), experiment, net, outcome),
        TASK.clients,
    )


def legacy_apps(attack: Attack | None, kind: str = "train", **options: Any) -> Apps:
    experiment = LegacyExperiment(TASK, **options)
    net = fedpara.factorised(TASK.net)
    mods = [] if attack is None else [tampering(attack, CULPRIT, kind)]

    def server(outcome: Outcome) -> ServerApp:
        return fedpara.server_app(ServerApp(server_fn=components(experiment, net, outcome)))

    return Apps(
        lambda: legacy_client_app(experiment, net, [*mods, fedpara.client_mod]),
        server,
        TASK.clients,
    )


def scaffold_apps(attack: Attack | None) -> Apps:
    apps = drift_apps(DriftExperiment(fedpara.Scaffold, task=TASK))
    if attack is None:
        return apps

    def client() -> ClientApp:
        app = apps.client()
        app._mods = [tampering(attack, CULPRIT), *app._mods]
        app._registered_funcs = {}
        return app

    return replace(apps, client=client)


def without_the_culprit(sent: Sent) -> bool:
    return (sent.kind, sent.partition) == ("train", CULPRIT)


@cache
def reference(api: str) -> Outcome:
    """Run where the culprit's replies to training messages never arrive."""
    apps = {"message": message_apps, "legacy": legacy_apps, "scaffold": scaffold_apps}[api](None)
    return federate(apps, SECTION, late=without_the_culprit)


def check_left_out(outcome: Outcome, api: str, says: str) -> None:
    """Assert one line a round with node and reason, and the others' very result."""
    node = f"node {outcome.grid.node_id(CULPRIT)}"
    lines = [line for line in outcome.log if "left out" in line and node in line]
    assert len(lines) == TASK.rounds, lines
    assert all(re.search(says, line) for line in lines), lines
    assert not any("\n" in line or len(line) > 2500 for line in lines)
    others = [line for line in outcome.log if "left out" in line and node not in line]
    assert not others
    assert outcome.state.keys() == reference(api).state.keys()
    for name, value in reference(api).state.items():
        assert torch.equal(outcome.state[name], value), name
    assert len(outcome.losses) == TASK.rounds + 1


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_is_left_out_and_named(name: str) -> None:
    attack, says = HOSTILE[name]
    check_left_out(federate(message_apps(attack), SECTION), "message", says)


@pytest.mark.in_turn(every=4)
@pytest.mark.parametrize("name", LEGACY)
def test_a_hostile_reply_of_the_legacy_api(name: str) -> None:
    attack, says = LEGACY[name]
    check_left_out(federate(legacy_apps(attack), SECTION), "legacy", says)


@pytest.mark.parametrize("name", VARIATES)
def test_a_hostile_reply_to_scaffold(name: str) -> None:
    attack, says = VARIATES[name]
    check_left_out(federate(scaffold_apps(attack), SECTION), "scaffold", says)


EVALUATIONS = [
    "NaN examples",
    "no metrics",
    "a missing weight",
    "an integer as a flag",
    "no marker",
]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_hostile_reply_to_an_evaluation(name: str) -> None:
    attack, _ = HOSTILE[name]
    outcome = federate(message_apps(attack, kind="evaluate"), SECTION)
    node = f"node {outcome.grid.node_id(CULPRIT)}"
    assert len([line for line in outcome.log if "left out" in line and node in line]) == TASK.rounds
    assert len(outcome.client_accuracies) == TASK.rounds
    assert all(0 <= value <= 1 for value in outcome.client_accuracies.values())


@pytest.mark.parametrize(
    "name", ["a shape of 8 TB", "half a payload", "NaN", "another forged type"]
)
def test_the_first_weights_come_from_another_client(name: str) -> None:
    """A legacy server asks one client for them; if its answer is of no use, it asks another."""
    attack, says = LEGACY[name]
    if name == "another forged type":
        attack, says = LEGACY["a forged type"][0], "it answers as 'evaluate'"
    honest = federate(legacy_apps(None, initial=False), SECTION)
    asked = next(s.partition for s in honest.sent if s.kind == "get_parameters")
    experiment = LegacyExperiment(TASK, initial=False)
    net = fedpara.factorised(TASK.net)
    mods = [tampering(attack, asked, "get_parameters"), fedpara.client_mod]
    apps = replace(
        legacy_apps(None, initial=False), client=lambda: legacy_client_app(experiment, net, mods)
    )
    outcome = federate(apps, SECTION)
    assert any(re.search(says, line) for line in outcome.log if "left out" in line)
    for key, value in honest.state.items():
        assert torch.equal(outcome.state[key], value)


# Who answers


class Forging(InProcessGrid):
    """Delivers some replies twice, and one of a node that nobody asked."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        if not replies or replies[0].metadata.message_type != "train":
            return replies
        again = federate_copy(replies[0])
        stranger = federate_copy(replies[1])
        stranger.metadata.__dict__["_src_node_id"] = 4711
        return [*replies, again, stranger]


def federate_copy(message: Message) -> Message:
    from harness.flower.inprocess_grid import WireObject

    copy: Message = WireObject.of(message).rebuilt()
    copy.metadata.__dict__["_message_id"] = message.metadata.message_id
    return copy


def test_a_second_reply_and_one_of_a_stranger_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = federate(message_apps(None), SECTION)
    monkeypatch.setattr("harness.flower.apps.InProcessGrid", Forging)
    outcome = federate(message_apps(None), SECTION)
    lines = [line for line in outcome.log if "was not asked, or has answered already" in line]
    assert len(lines) == 2 * TASK.rounds
    assert sum("4711" in line for line in lines) == TASK.rounds
    for name, value in honest.state.items():
        assert torch.equal(outcome.state[name], value)


# Too few


def test_a_round_whose_replies_are_all_bad_fails_and_the_run_goes_on() -> None:
    """Only where the first round has shown that clients can work with the plugin."""
    rounds: list[int] = []

    def attack(reply: Message) -> None:
        rounds.append(1)
        if len(rounds) > TASK.clients:
            HOSTILE["NaN"][0](reply)

    net, experiment = fedpara.factorised(TASK.net), Experiment(replace(TASK, rounds=3))
    mods = [tampering(attack, n) for n in range(TASK.clients)]
    apps = replace(
        message_apps(None),
        client=lambda: train_app(ClientApp(mods=[*mods, fedpara.client_mod]), experiment, net),
        server=lambda o: main_app(fedpara.server_app(ServerApp()), experiment, net, o),
    )
    outcome = federate(apps, SECTION)
    assert len([line for line in outcome.log if "none of 4 replies can be used" in line]) == 2
    assert outcome.losses[1] == outcome.losses[2] == outcome.losses[3] != outcome.losses[0]


def test_a_strategy_that_cannot_do_with_fewer_lets_its_round_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flwr.serverapp.strategy import FedAvg

    original = FedAvg.aggregate_train

    def needs_all(self: Any, number: int, replies: Any) -> Any:
        replies = list(replies)
        if len(replies) < TASK.clients:
            raise ZeroDivisionError("too few")
        return original(self, number, replies)

    monkeypatch.setattr(FedAvg, "aggregate_train", needs_all)
    outcome = federate(message_apps(HOSTILE["NaN"][0]), SECTION)
    said = [line for line in outcome.log if "round 1 fails: 1 replies were left out" in line]
    assert len(said) == 1
    assert "other 3 (ZeroDivisionError: too few)" in said[0]
    assert len(set(outcome.losses)) == 1


# Outliers


@pytest.mark.parametrize("option", ["warn", "leave-out", "ignore"])
@pytest.mark.parametrize("api", ["message", "legacy"])
def test_an_absurd_update_is_named_and_left_out_if_asked(api: str, option: str) -> None:
    attack = one(lambda t: torch.full_like(t, 1e12))
    make = message_apps if api == "message" else legacy_apps
    outcome = federate(make(attack), {**SECTION, "fedpara.outliers": option}, raises=False)
    node = f"node {outcome.grid.node_id(CULPRIT)}"
    named = [line for line in outcome.log if node in line and "far outside" in line]
    if option == "ignore":
        assert not named
        return
    assert named
    assert "norm" in named[0]
    assert "limit" in named[0]
    assert all(node in line for line in outcome.log if "far outside" in line)
    if (api, option) == ("message", "leave-out"):
        for name, value in reference(api).state.items():
            assert torch.equal(outcome.state[name], value)


def test_random_bytes_in_the_place_of_any_array() -> None:
    draw = random.Random(5)

    def attack(reply: Message) -> None:
        for record in reply.content.array_records.values():
            for array in record.values():
                data = bytearray(array.data)
                for _ in range(draw.randint(1, 8)):
                    data[draw.randrange(len(data))] = draw.randrange(256)
                array.data = bytes(data)

    outcome = federate(message_apps(attack), SECTION)
    check_left_out(outcome, "message", "")
