"""Training options on Flower: the adapter determines where a round begins."""

from __future__ import annotations

import pytest
from torch import nn

import fedpara_plugins_flower as fedpara
from fedpara_plugins.training.step_hooks import round_progress
from harness.flower.apps import Experiment, Hooks, federate, plugin_apps
from harness.oracles.task import TrainingTask

SECTION = {"fedpara.method": "pfedpara", "fedpara.gamma": 0.3, "fedpara.schedule": "decoupled"}


@pytest.mark.parametrize(("wanted", "share"), [(3, None), (0.5, 0.5)])
def test_private_steps_are_counted_anew_in_every_round(wanted: float, share: float | None) -> None:
    """A number of steps, or a share of what this client made in the round before."""
    seen: dict[tuple[int, int], tuple[int, int]] = {}

    def trained(model: nn.Module, client: int, server_round: int) -> None:
        training = round_progress(model)
        assert training is not None
        seen[client, server_round] = (training.private_steps, training.steps)

    section = SECTION | {"fedpara.private-steps": wanted, "fedpara.first-private-steps": 2}
    outcome = federate(
        plugin_apps(Experiment(TrainingTask(), hooks=Hooks(trained=trained))), section
    )
    assert len(seen) == 3 * 4  # rounds, clients
    assert outcome.losses[-1] < outcome.losses[0]
    for (client, server_round), (private, steps) in seen.items():
        assert steps > private
        if share is None:
            assert private == wanted
        elif server_round == 1:
            assert private == 2
        else:
            assert private == round(share * seen[client, server_round - 1][1])


def test_the_relative_clip_reaches_the_clients() -> None:
    """Factors stay where they are at a share of almost nothing, and other parameters move."""
    still = federate(plugin_apps(Experiment()), SECTION | {"fedpara.clip": "relative:1e-9"})
    moved = federate(plugin_apps(Experiment()), SECTION | {"fedpara.clip": "relative:0.5"})
    assert abs(moved.losses[-1] - moved.losses[0]) > 0.1
    assert abs(still.losses[-1] - still.losses[0]) < abs(moved.losses[-1] - moved.losses[0]) / 2


def test_clip_reaches_the_clients() -> None:
    clipped = federate(plugin_apps(Experiment()), SECTION | {"fedpara.clip": 1e-6})
    free = federate(plugin_apps(Experiment()), SECTION)
    assert abs(clipped.losses[-1] - clipped.losses[0]) < 1e-3
    assert free.losses[0] - free.losses[-1] > 0.1


def test_options_are_read_as_documented() -> None:
    settings = fedpara.Settings.from_run_config(SECTION | {"fedpara.clip": "1.0", "lr": 0.1})
    assert settings.config.schedule == "decoupled"
    assert settings.config.clip == 1.0
