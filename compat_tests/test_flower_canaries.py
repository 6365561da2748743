"""The search in every run of the harness: a client that sends what it keeps is found."""

from __future__ import annotations

from typing import Any

import pytest

from fedpara_plugins.codecs import PRESETS
from fedpara_plugins.exchange import client_round
from fedpara_plugins.exchange.outgoing import Outgoing
from harness.cells.flower import CODECS, GAMMA
from harness.flower.apps import Experiment, federate, plugin_apps
from harness.oracles.task import TrainingTask

TASK = TrainingTask(clients=2, rounds=1, epochs=1)


def _section(codec: str, **options: str) -> dict[str, Any]:
    return {
        "fedpara.method": "pfedpara",
        "fedpara.gamma": GAMMA,
        "fedpara.codec": codec,
        **{f"fedpara.{name}": value for name, value in options.items()},
    }


def _leaking(monkeypatch: pytest.MonkeyPatch, renamed: bool) -> None:
    select = client_round.select_outgoing

    def everything(record: str, tensors: Any, *args: Any, **options: Any) -> Outgoing:
        part = select(record, tensors, *args, **options)
        more = {k: v for k, v in tensors.items() if k not in part.shared}
        if renamed:  # under a shared name of the same shape
            same = {key.replace(".x2", ".x1"): value for key, value in more.items()}
            return Outgoing(part.spec, {k: same.get(k, v) for k, v in part.shared.items()})
        return Outgoing(part.spec, {**part.shared, **more})

    monkeypatch.setattr(client_round, "select_outgoing", everything)


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", PRESETS)
def test_private_names_are_found(monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    _leaking(monkeypatch, renamed=False)
    with pytest.raises(AssertionError, match="private"):
        federate(plugin_apps(Experiment(TASK)), _section(codec), raises=False)


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", CODECS)
def test_private_values_are_found_under_other_names(
    monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """But not with codecs that send a few values of an update: those say little of its values."""
    _leaking(monkeypatch, renamed=True)
    with pytest.raises(AssertionError, match="private"):
        federate(plugin_apps(Experiment(TASK)), _section(codec), raises=False)


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("local", ["factors", "dense"])
@pytest.mark.parametrize("codec", PRESETS)
def test_a_client_that_does_not_is_not(codec: str, local: str) -> None:
    outcome = federate(plugin_apps(Experiment(TASK)), _section(codec, local=local))
    assert len(outcome.kept.private) >= 4
    if local == "factors":
        outcome.kept.check_control(outcome.traffic, raw=codec == "none")
