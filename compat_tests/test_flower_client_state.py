"""A client's ``state-dir`` of another method, model or options is reported, and nothing is lost."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpara_plugins as fedpara
from harness.cells.flower import GAMMA
from harness.flower.apps import Experiment, Hooks, Outcome, federate, plugin_apps
from harness.oracles.task import TrainingTask

State = dict[str, Tensor]
States = dict[tuple[int, int], State]

TASK = TrainingTask(rounds=2, epochs=1)

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "gamma": ({"gamma": 0.6}, r"'conv2.x2' is of shape \(32, \d+\) there and of shape"),
    "tanh": ({"tanh": True}, "names and shapes are those of this run"),
}
"""Options of a second run, and what its clients say of what the first one left."""


def _run(folder: Path, **options: Any) -> tuple[Outcome, States, States]:
    """Run, and return each client's private state before and after training, by round."""
    before: States = {}
    after: States = {}

    def noting(into: States) -> Any:
        def note(model: nn.Module, client: int, server_round: int) -> None:
            kept = fedpara.split(model).private
            into[client, server_round] = {key: value.clone() for key, value in kept.items()}

        return note

    hooks = Hooks(loaded=noting(before), trained=noting(after))
    chosen = {"method": "pfedpara", "gamma": GAMMA, "codec": "small", **options}
    section = {f"fedpara.{key}": value for key, value in chosen.items()}
    # A new run on the server's side, which would refuse its own folder of other options.
    shutil.rmtree(folder / "server", ignore_errors=True)
    section["fedpara.state-dir"] = str(folder)
    return federate(plugin_apps(Experiment(TASK, hooks=hooks)), section), before, after


def _told(outcome: Outcome) -> list[str]:
    return [line for line in outcome.log if "of another model or of other options" in line]


def _check_goes_on(before: States, after: States) -> None:
    for client in range(TASK.clients):
        kept = after[client, TASK.rounds]
        assert kept
        for key, value in kept.items():
            torch.testing.assert_close(before[client, 1][key], value, rtol=0, atol=0)


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("other", OTHERS)
def test_what_another_run_left_is_said_and_kept(tmp_path: Path, other: str) -> None:
    options, words = OTHERS[other]
    first, _, left = _run(tmp_path)
    assert not _told(first)
    second, _, own = _run(tmp_path, **options)
    for client in range(TASK.clients):
        lines = [line for line in _told(second) if f"client {client}: " in line]
        assert len(lines) == 1  # at the first message; then the client has a state of its own
        assert f"clients/{client}.sqlite holds private state" in lines[0]
        assert "this run's method is pfedpara" in lines[0]
        assert "set the earlier options" in lines[0]
        assert "choose another state-dir" in lines[0]
        assert re.search(words, lines[0])
    assert any("clients started from the seeded" in line for line in second.log)
    # Nothing is lost: each set of options goes on with what is its own.
    third, again, _ = _run(tmp_path)
    assert not _told(third)
    _check_goes_on(again, left)
    fourth, again, _ = _run(tmp_path, **options)
    assert not _told(fourth)
    _check_goes_on(again, own)


LOOSER: dict[str, dict[str, Any]] = {
    "fedpara": {"method": "fedpara"},
    "FedPer": {"method": "none", "private": "fc2.*"},
    "exclude": {"exclude": "fc1"},
    "overrides": {"overrides": "fc1: method=fedpara"},
}
"""Options of a second run that would share what the first one has kept."""


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("other", LOOSER)
def test_what_another_run_kept_private_is_never_shared(tmp_path: Path, other: str) -> None:
    _, _, left = _run(tmp_path)
    with pytest.raises(fedpara.FedParaError) as caught:
        _run(tmp_path, **LOOSER[other])
    method = LOOSER[other].get("method", "pfedpara")
    assert "holds private state of this model" in str(caught.value)
    assert f"this run (method {method}" in str(caught.value) or other == "overrides"
    assert "choose another state-dir" in str(caught.value)
    _, again, _ = _run(tmp_path)
    _check_goes_on(again, left)
