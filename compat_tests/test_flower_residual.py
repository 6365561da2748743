"""Fine-tuning of trained weights: the residual form, and runs that would lose such weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpara_plugins as fedpara
from fedpara_plugins.models import conversion
from harness.cells.flower import GAMMA
from harness.flower.apps import Apps, Experiment, Hooks, federate, plugin_apps
from harness.oracles.plain_loop import RULES, run_plain_loop
from harness.oracles.task import TrainingTask, evaluate, train

State = dict[str, Tensor]


@cache
def _trained() -> State:
    """The state of a dense model after training on all clients' data."""
    task = TrainingTask(clients=2)
    torch.manual_seed(5)
    net = task.net()
    for step in range(1, 13):
        for client in range(task.clients):
            train(net, task.batches(client, step), lr=0.1)
    return {name: value.clone() for name, value in net.state_dict().items()}


def _pretrained() -> nn.Module:
    net = TrainingTask().net()
    net.load_state_dict(_trained())
    return net


@dataclasses.dataclass(frozen=True)
class FineTuning(TrainingTask):
    """A task whose models are loaded with trained weights when they are built."""

    @property
    def net(self) -> Callable[[], nn.Module]:  # type: ignore[override]
        return _pretrained


TASK = FineTuning(clients=2, rounds=2, epochs=1)
FRESH = TrainingTask(clients=2, rounds=2, epochs=1)


def _section(method: str, codec: str = "lossless", **options: Any) -> dict[str, Any]:
    chosen = {"method": method, "codec": codec, "gamma": GAMMA, **options}
    return {f"fedpara.{key}": value for key, value in chosen.items()}


def _apps(clients: TrainingTask, hooks: Hooks | None = None) -> Apps:
    """The server starts from trained weights; the clients build the models of their own task."""
    experiment = Experiment(clients, hooks=hooks or Hooks())
    return Apps(plugin_apps(experiment).client, plugin_apps(Experiment(TASK)).server, 2)


@pytest.fixture(autouse=True)
def _nothing_told() -> None:
    """The log says what it found once per process."""
    conversion._notes_told.clear()


@pytest.mark.in_turn
@pytest.mark.parametrize("clients", [TASK, FRESH], ids=["trained", "fresh"])
@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
def test_trained_weights_get_an_update_by_default(method: str, clients: TrainingTask) -> None:
    """On clients whose own weights are fresh too: the server's decide."""
    bases: list[State] = []

    def trained(model: nn.Module, client: int, server_round: int) -> None:
        found = {k: v for k, v in model.state_dict().items() if k.endswith("_base")}
        bases.append({k: v.detach().clone() for k, v in found.items()})

    outcome = federate(_apps(clients, Hooks(trained=trained)), _section(method))
    loss, accuracy = evaluate(_pretrained(), TASK.test_data())
    assert outcome.losses[0] == loss
    assert outcome.accuracies[0] == accuracy
    assert outcome.losses[-1] != loss
    assert len(bases) == 4
    for found in bases:
        assert found
        for name, value in found.items():
            expected = _trained()[name.removesuffix("_base")]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)  # a mean of equals
    assert any("looks trained" in line for line in outcome.log)


@pytest.mark.in_turn
@pytest.mark.parametrize("train", ["both", "right"])
@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
def test_a_run_is_that_of_a_plain_loop(method: str, train: str) -> None:
    options = {"base": "frozen", "train": train}

    def build() -> nn.Module:
        return fedpara.convert(_pretrained(), method=method, gamma=GAMMA, **options)

    outcome = federate(plugin_apps(Experiment(TASK)), _section(method, **options))
    private = fedpara.split(build()).private.keys()
    plain = run_plain_loop(TASK, build, RULES["fedavg"](), private_names=tuple(private))
    for name in plain.state.keys() - private:
        torch.testing.assert_close(
            outcome.state[name].double(), plain.state[name].double(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("options", [{"init": "seeded"}, {"init": "random"}, {"base": "factors"}])
def test_a_run_that_would_lose_trained_weights_ends_before_its_first_round(
    options: dict[str, Any],
) -> None:
    outcome = federate(_apps(FRESH), _section("fedpara", **options), raises=False)
    assert isinstance(outcome.error, fedpara.ConfigError)
    for text in ("looks trained", "base='frozen'", "init='fit'", "trained='discard'"):
        assert text in str(outcome.error)
    assert not outcome.sent
    again = federate(_apps(FRESH), _section("fedpara", trained="discard", **options))
    assert not any(name.endswith("_base") for name in again.state)


def test_the_export_of_a_run_is_the_dense_model(tmp_path: Any) -> None:
    path = tmp_path / "dense.safetensors"
    outcome = federate(_apps(FRESH), _section("fedpara", checkpoint=str(path)))
    from safetensors.torch import load_file

    net = TASK.net()
    net.load_state_dict(load_file(path), strict=True)
    loss, _ = evaluate(net, TASK.test_data())
    assert loss == pytest.approx(outcome.losses[-1], rel=1e-4)
