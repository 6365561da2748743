"""Runs that must be the same: to the bit, message by message."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpara_plugins as fedpara
from harness.cells.environments import selection
from harness.cells.flower import GAMMA, METHODS, every_strategy
from harness.cells.strategies import STRATEGIES
from harness.flower.apps import Experiment, Outcome, federate, plain_apps, plugin_apps
from harness.flower.inprocess_grid import Sent
from harness.oracles.task import MODELS, TrainingTask

Key = tuple[str, int, str, int]

EVERY = every_strategy(selection())


@cache
def _run(
    strategy: str,
    method: str | None,
    codec: str = "none",
    model: str = "groupnorm",
    mu: float = 0.1,
) -> Outcome:
    """Run with the plugin's lines; method None leaves the config section out."""
    options = {"proximal_mu": mu} if strategy == "fedprox" else {}
    section: dict[str, Any] = {}
    if method is not None:
        section = _section(method, codec)
    return federate(plugin_apps(Experiment(_task(strategy, model), strategy, options)), section)


def _section(method: str, codec: str) -> dict[str, Any]:
    """Return a section without the harness's ``clip``: an empty text is the default."""
    options = {"method": method, "codec": codec, "gamma": GAMMA, "clip": ""}
    return {f"fedpara.{key}": value for key, value in options.items()}


def _task(strategy: str, model: str = "groupnorm") -> TrainingTask:
    return TrainingTask(model=model, clients=STRATEGIES[strategy].clients, epochs=1)


def _by_place(outcome: Outcome) -> dict[Key, Sent]:
    """Return every message by its place in the run; each place holds one."""
    places: dict[Key, Sent] = {(s.kind, s.round, s.direction, s.partition): s for s in outcome.sent}
    clients = len({s.partition for s in outcome.sent})
    assert len(places) == len(outcome.sent) == 2 * 3 * 2 * clients  # kinds, rounds, directions
    assert clients >= 4
    return places


def _array_bytes(sent: Sent) -> dict[str, list[tuple[str, bytes]]]:
    return {
        name: [(key, bytes(array.data)) for key, array in record.items()]
        for name, record in sent.arrays.items()
    }


def _assert_same_messages(mine: Outcome, theirs: Outcome) -> None:
    left, right = _by_place(mine), _by_place(theirs)
    assert left.keys() == right.keys()
    for place, sent in left.items():
        assert list(sent.content) == list(right[place].content), place
        assert _array_bytes(sent) == _array_bytes(right[place]), place
        # Flower's id of the content is the hash of everything in it: metrics and configs too.
        assert sent.content.object_id == right[place].content.object_id, place


def _assert_same_weights(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(mine) == list(theirs)
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value, theirs[key]), key


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_fedprox_with_mu_0_is_fedavg_bit_for_bit(method: str, codec: str) -> None:
    fedavg = _run("fedavg", method, codec)
    _assert_same_weights(_run("fedprox", method, codec, mu=0.0).state, fedavg.state)
    other = _run("fedprox", method, codec, mu=0.1).state
    assert not all(torch.equal(other[key], value) for key, value in fedavg.state.items())


@pytest.mark.parametrize(
    ("strategy", "model"),
    [*((strategy, "groupnorm") for strategy in EVERY), ("fedavg", "batchnorm")],
)
def test_with_method_and_codec_none_every_message_is_the_plain_apps(
    strategy: str, model: str
) -> None:
    assert model in MODELS
    plain = federate(plain_apps(Experiment(_task(strategy, model), strategy)))
    plugged = _run(strategy, "none", "none", model)
    _assert_same_messages(plugged, plain)
    _assert_same_weights(plugged.state, plain.state)
    assert plugged.losses == plain.losses


@pytest.mark.parametrize("strategy", EVERY)
def test_without_a_section_every_message_is_that_of_none(strategy: str) -> None:
    _assert_same_messages(_run(strategy, None), _run(strategy, "none"))


def test_the_comparison_of_messages_sees_a_difference() -> None:
    with pytest.raises(AssertionError):
        _assert_same_messages(_run("fedavg", "none"), _run("fedavg", "none", "int8"))
    with pytest.raises(AssertionError):
        _assert_same_messages(_run("fedavg", "none"), _run("fedprox", "none"))


@pytest.mark.in_turn
@pytest.mark.parametrize("method", ["lowrank", "fedpara"])
@pytest.mark.parametrize("strategy", EVERY)
def test_without_private_factors_the_run_is_that_of_a_converted_model(
    strategy: str, method: str
) -> None:
    """The plugin adds the conversion and a container for the arrays, nothing to the numbers."""
    task = _task(strategy)

    def converted() -> nn.Module:
        return fedpara.convert(task.net(), method=method, gamma=GAMMA)

    by_hand = federate(plain_apps(Experiment(task, strategy), converted))
    plugged = _run(strategy, method)
    _assert_same_weights(plugged.state, by_hand.state)
    assert plugged.losses == by_hand.losses


@pytest.mark.parametrize("codec", ["lossless", "zlib"])
def test_a_lossless_codec_changes_no_weight(codec: str) -> None:
    _assert_same_weights(_run("fedavg", "fedpara", codec).state, _run("fedavg", "fedpara").state)


def test_runs_repeat_bit_for_bit() -> None:
    """What all of the above rests on."""
    again = federate(
        plugin_apps(Experiment(_task("fedavg"), "fedavg")), _section("pfedpara", "int8")
    )
    _assert_same_messages(again, _run("fedavg", "pfedpara", "int8"))
