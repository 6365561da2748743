"""FedAvg in FedML's single process equals a plain loop; with the plugin off it is FedML's own."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS
from safetensors.torch import load_file

from fedpara_plugins import ModelSpec, convert
from harness.fedml.project import dataset, model, run
from harness.oracles.fedml_fedavg import FedAvgLoop

METHODS = ("none", "lowrank", "fedpara", "pfedpara")


def expected(method: str, rounds: int = 3, a_round: int = 2) -> dict[str, torch.Tensor]:
    net = convert(model(), method=method, gamma=0.5)
    private = ModelSpec.of(net).initial_private()
    loop = FedAvgLoop(net, dataset()[5], private=private)
    return loop.run(rounds, a_round)


@pytest.mark.parametrize("method", METHODS)
def test_equals_a_plain_loop(method: str) -> None:
    found = run(fedpara_method=method, fedpara_gamma=0.5, fedpara_mend=True).state
    wanted = expected(method)
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    private = found.keys() - wanted.keys()
    assert bool(private) == (method == "pfedpara")
    assert all(not found[name].any() for name in private)


def test_with_nothing_on_it_is_fedmls_own_run() -> None:
    ours, theirs = run().state, run(plain=True).state
    assert type(run().runner.runner).__module__.startswith("fedml.")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # FedML's own first round trains clients one after the other on each other's result.
    wanted = expected("none")
    assert any((theirs[name] - wanted[name]).abs().max() > 1e-3 for name in wanted)


class BatchNet(torch.nn.Module):
    """With BatchNorm: float buffers, and an integer one without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(32, 64)
        self.norm = torch.nn.BatchNorm1d(64)
        self.second = torch.nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return y


@pytest.mark.parametrize("method", ["none", "fedpara", "pfedpara"])
def test_buffers_are_averaged_and_integers_stay_integers(method: str) -> None:
    net = convert(BatchNet(), method=method, gamma=0.5)
    loop = FedAvgLoop(net, dataset()[5], private=ModelSpec.of(net).initial_private())
    wanted = loop.run(3, 2)
    outcome = run(net=BatchNet(), fedpara_method=method, fedpara_gamma=0.5, fedpara_mend=True)
    for name, value in wanted.items():
        assert outcome.state[name].dtype == value.dtype
        torch.testing.assert_close(outcome.state[name], value, rtol=1e-5, atol=1e-6)
    assert int(outcome.state["norm.num_batches_tracked"]) > 5


def _without_first_layer(state: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((k, v) for k, v in state.items() if not k.startswith("0."))


class SendsAPart(ModelTrainerCLS):
    """The first layer is frozen, and never travels."""

    def get_model_params(self) -> Any:
        return _without_first_layer(self.model.state_dict())

    def set_model_params(self, params: Any) -> None:
        self.model.load_state_dict(params, strict=False)


class AveragesAPart(DefaultServerAggregator):
    def get_model_params(self) -> Any:
        return _without_first_layer(self.model.state_dict())

    def set_model_params(self, params: Any) -> None:
        self.model.load_state_dict(params, strict=False)


@pytest.mark.parametrize("method", ["none", "pfedpara"])
def test_a_project_may_exchange_a_part_of_its_model(method: str, tmp_path: Path) -> None:
    def frozen() -> torch.nn.Module:
        net = model()
        for parameter in net[0].parameters():
            parameter.requires_grad = False
        return net

    net = convert(frozen(), method=method, gamma=0.5)
    loop = FedAvgLoop(net, dataset()[5], private=ModelSpec.of(net).initial_private())
    wanted = loop.run(3, 2)
    outcome = run(
        net=frozen(),
        client_trainer=SendsAPart,
        server_aggregator=AveragesAPart,
        fedpara_method=method,
        fedpara_gamma=0.5,
        fedpara_mend=True,
        fedpara_checkpoint=str(tmp_path / "server.safetensors"),
        fedpara_client_checkpoints=str(tmp_path),
    )
    for path in tmp_path.iterdir():
        model().load_state_dict(load_file(path), strict=True)
    assert len(list(tmp_path.iterdir())) == 5
    assert not [name for name in outcome.state if name.startswith("0.")]
    for name, value in _without_first_layer(wanted).items():
        torch.testing.assert_close(outcome.state[name], value, rtol=1e-5, atol=1e-6)
