"""Infinities that belong to a model, a persistent causal mask of ``-inf``, through whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedpara_plugins.codecs import PRESETS
from fedpara_plugins.exchange import client_round
from fedpara_plugins_flower import FedDyn, Scaffold
from harness.cells.flower import GAMMA
from harness.cells.strategies import STRATEGIES
from harness.flower.apps import Experiment, Hooks, Outcome, federate, plugin_apps
from harness.flower.drift_apps import DriftExperiment, drift_apps
from harness.flower.legacy_apps import LegacyExperiment, legacy_plugin_apps
from harness.oracles.task import Net, TrainingTask

METHODS = ("none", "lowrank", "fedpara", "pfedpara")
MASK = torch.full((8, 8), float("-inf")).triu(1)


class MaskedNet(Net):
    """Rows of the image attend to themselves and those above."""

    persistent = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", MASK.clone(), persistent=self.persistent)

    def forward(self, images: Tensor) -> Tensor:
        """Attend, then classify."""
        mask: Tensor = self.mask  # type: ignore[assignment]
        rows = images.flatten(1).unflatten(1, (8, 8))
        seen = torch.softmax(rows @ rows.transpose(1, 2) + mask, dim=-1) @ rows
        return super().forward(seen.unsqueeze(1))


class WithoutMaskInState(MaskedNet):
    """The same, with the mask out of the state."""

    persistent = False


class MaskedTask(TrainingTask):
    """Three short rounds of such a model."""

    @property
    def net(self) -> type[Net]:
        """Return the model's class."""
        return MaskedNet


class PlainTask(TrainingTask):
    """The same without a mask in the state, which is what must come of all other tensors."""

    @property
    def net(self) -> type[Net]:
        """Return the model's class."""
        return WithoutMaskInState


SHORT: dict[str, Any] = {"clients": 2, "rounds": 3, "epochs": 1}


def _section(method: str, codec: str, **more: Any) -> dict[str, Any]:
    chosen = {"method": method, "codec": codec, "gamma": GAMMA, **more}
    return {f"fedpara.{key.replace('_', '-')}": value for key, value in chosen.items()}


def _assert_masked(state: dict[str, Tensor]) -> None:
    assert torch.equal(state["mask"].float(), MASK)
    others = [value for name, value in state.items() if name != "mask"]
    assert len(others) > 9
    assert all(torch.isfinite(value.double()).all() for value in others)


def _seen_by_clients(model: nn.Module, client: int, server_round: int) -> None:
    assert torch.equal(model.get_buffer("mask"), MASK)


@pytest.mark.in_turn
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
@pytest.mark.parametrize("codec", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_mask_is_the_same_at_the_end_and_in_the_checkpoint(
    method: str, codec: str, strategy: str, tmp_path: Path
) -> None:
    hooks = Hooks(loaded=_seen_by_clients, evaluated=_seen_by_clients)
    experiment = Experiment(MaskedTask(**SHORT), strategy=strategy, hooks=hooks)
    path = tmp_path / "dense.safetensors"
    outcome = federate(plugin_apps(experiment), _section(method, codec, checkpoint=str(path)))
    _assert_masked(outcome.state)
    assert not any("left out" in line for line in outcome.log)
    assert outcome.losses[-1] < outcome.losses[0]
    written = load_file(path)
    assert written["mask"].dtype == torch.float32
    _assert_masked(written)


@pytest.mark.parametrize("codec", ["balanced", "small"])
def test_a_mask_in_versions_on_a_grid(codec: str) -> None:
    experiment = Experiment(MaskedTask(**SHORT), hooks=Hooks(loaded=_seen_by_clients))
    section = _section("fedpara", codec, references="grid")
    _assert_masked(federate(plugin_apps(experiment), section).state)


NORMS = [name for name, spec in STRATEGIES.items() if spec.norms and not spec.client_mod]


@pytest.mark.in_turn
@pytest.mark.parametrize("strategy", ["fedavgm", "fedadagrad", "fedyogi", "fedmedian", *NORMS])
def test_all_other_tensors_are_what_they_are_without_a_mask_in_the_state(strategy: str) -> None:
    """A norm over all tensors is not NaN, so that Krum chooses and clipping clips as ever."""
    sizes = {**SHORT, "rounds": 2, "clients": STRATEGIES[strategy].clients}
    found, wanted = (
        federate(plugin_apps(Experiment(task, strategy=strategy)), _section("none", "small"))
        for task in (MaskedTask(**sizes), PlainTask(**sizes))
    )
    _assert_masked(found.state)
    for name, value in wanted.state.items():
        assert torch.equal(found.state[name], value), name
    assert found.losses == wanted.losses


@pytest.mark.parametrize("strategy", [Scaffold, FedDyn])
def test_drift_corrections_beside_a_mask(strategy: Any) -> None:
    made = DriftExperiment(strategy, {"guard": None}, task=MaskedTask(**SHORT))
    outcome = federate(drift_apps(made), _section("fedpara", "small"))
    _assert_masked(outcome.state)
    assert not any("left out" in line for line in outcome.log)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_the_legacy_api_with_first_weights_of_a_client_or_the_server(strategy: str) -> None:
    task = MaskedTask(**SHORT)
    initial = strategy == "fedadam"
    hooks = Hooks(loaded=_seen_by_clients)
    made = LegacyExperiment(task, strategy=strategy, initial=initial, hooks=hooks)
    outcome = federate(legacy_plugin_apps(made), _section("fedpara", "small"))
    _assert_masked(outcome.state)


def _one_client_diverges(model: nn.Module, client: int, server_round: int) -> None:
    if client == 1 and server_round == 2:
        with torch.no_grad():
            model.get_parameter("fc2.bias")[3] = float("inf")


@pytest.mark.parametrize("checked_by", ["client", "server"])
def test_a_parameter_that_becomes_infinite_leaves_that_client_out(
    checked_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if checked_by == "server":
        monkeypatch.setattr(client_round, "check_finite", lambda *args, **kwargs: None)
    task = replace(MaskedTask(**SHORT), clients=3)
    apps = plugin_apps(Experiment(task, hooks=Hooks(trained=_one_client_diverges)))
    outcome: Outcome = federate(apps, _section("fedpara", "small"))
    _assert_masked(outcome.state)
    (said,) = [line for line in outcome.log if "'fc2.bias' holds 1 NaN or infinite" in line]
    assert str(outcome.grid.node_id(1)) in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "or set the fedpara option clip = relative. If"),
        ({"clip": 0.5}, "or the fedpara option clip, which is 0.5. If"),
        ({"clip": "relative"}, "or the fedpara option clip, which is relative. If"),
        ({"local": "dense"}, "or clip gradients in your own training loop. If"),
    ],
    ids=["no-clip", "clip", "relative", "dense"],
)
def test_what_to_do_follows_from_the_options(more: dict[str, Any], said: str) -> None:
    apps = plugin_apps(
        Experiment(MaskedTask(**SHORT), hooks=Hooks(trained=lambda model, *_: _spoil(model)))
    )
    outcome = federate(apps, _section("fedpara", "none", **more), raises=False)
    assert f"Lower the learning rate, {said}" in str(outcome.error)


@torch.no_grad()
def _spoil(model: nn.Module) -> None:
    model.get_parameter("fc2.bias")[3] = float("inf")
