"""Trainers that exchange a part of their model, and frozen parameters, which are not sent."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS
from torch import nn

from fedpara_plugins import ConversionError, FedParaError
from fedpara_plugins_fedml import FedMLRunner
from fedpara_plugins_fedml.messages.envelope import unpack
from harness.fedml.project import arguments, dataset, model, run
from harness.oracles.descriptions import decode_payload, peek_header

METHOD = {"fedpara_gamma": 0.3, "fedpara_min_size": 256}


class Net(nn.Module):
    """A frozen body and a head inside of a module."""

    def __init__(self, *, freezes: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(32, 48).requires_grad_(not freezes)
        self.heads = nn.Module()
        self.heads.hidden = nn.Linear(48, 32)
        self.heads.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        out: torch.Tensor = self.heads.head(torch.tanh(self.heads.hidden(torch.tanh(self.body(x)))))
        return out


class HeadTrainer(ModelTrainerCLS):
    """A trainer that exchanges its head, under the names that the head itself has."""

    def get_model_params(self) -> Any:
        """Return the head."""
        return OrderedDict(self.model.heads.state_dict())

    def set_model_params(self, model_parameters: Any) -> None:
        """Load the head."""
        self.model.heads.load_state_dict(model_parameters)


class HeadAggregator(DefaultServerAggregator):
    """The same on the server."""

    get_model_params = HeadTrainer.get_model_params
    set_model_params = HeadTrainer.set_model_params


def federated(*, part: bool = False, **keys: Any) -> Any:
    custom = {"client_trainer": HeadTrainer, "server_aggregator": HeadAggregator} if part else {}
    return run(net=Net(), comm_round=2, client_num_per_round=4, **METHOD, **custom, **keys)


def models(outcome: Any) -> list[bytes]:
    return [unpack(sent.data).payloads["model"] for sent in outcome.sent]


@pytest.mark.parametrize("method", ["none", "fedpara", "pfedpara"])
def test_a_trainer_that_exchanges_its_head(method: str) -> None:
    outcome = federated(part=True, fedpara_method=method, fedpara_codec="small")
    described = peek_header(models(outcome)[-1]).model
    assert described is not None
    rows = {row[0]: row[1] for row in described["weights"]}
    assert rows == ({} if method == "none" else {"hidden.weight": method})
    assert all(torch.isfinite(value).all() for value in outcome.state.values())


def test_other_names_do_not_go_with_an_optimizer_of_clients() -> None:
    with pytest.raises(ConversionError, match="own names"):
        federated(
            part=True, fedpara_method="none", fedpara_codec="small",
            federated_optimizer="FedProx", fedprox_mu=0.1,
        )  # fmt: skip


@pytest.mark.parametrize("method", ["none", "fedpara"])
def test_frozen_parameters_are_in_no_message(method: str) -> None:
    left_out = federated(fedpara_method=method, fedpara_codec="lossless")
    sent = federated(fedpara_method=method, fedpara_codec="lossless", fedpara_send="all")
    names = {n for p in models(left_out) for n in decode_payload(p, limit=10**6).tensors}
    assert not {name for name in names if name.startswith("body")}
    assert left_out.state.keys() == sent.state.keys()
    for name, value in sent.state.items():
        assert torch.allclose(left_out.state[name], value, atol=1e-6), name


class Adapted(nn.Module):
    """A frozen layer with an adapter under PEFT's names."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(32, 4).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(32, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, 4, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of the layer and the adapter."""
        out: torch.Tensor = self.layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return out


class AdapterTrainer(ModelTrainerCLS):
    """A trainer that exchanges its adapter, without the adapter's name."""

    def get_model_params(self) -> Any:
        """Return the adapter."""
        state = self.model.state_dict()
        return OrderedDict((k.replace(".default", ""), v) for k, v in state.items() if "lora_" in k)

    def set_model_params(self, model_parameters: Any) -> None:
        """Load the adapter."""
        named = {k.replace(".weight", ".default.weight"): v for k, v in model_parameters.items()}
        self.model.load_state_dict(named, strict=False)


class OwnRank(AdapterTrainer):
    """Loads nothing, and answers with its own adapter."""

    def set_model_params(self, model_parameters: Any) -> None:
        """Load nothing."""


class AdapterAggregator(DefaultServerAggregator):
    """The same on the server."""

    get_model_params = AdapterTrainer.get_model_params
    set_model_params = AdapterTrainer.set_model_params


def answered(server: nn.Module, client: nn.Module, kind: Any = AdapterTrainer) -> Any:
    """Return a client's answer to a server's first message; the server has taken it."""
    runners = []
    for net in (server, client):
        args = arguments(fedpara_method="none", fedpara_codec="small")
        parts = {
            "client_trainer": kind(net, args),
            "server_aggregator": AdapterAggregator(net, args),
        }
        runners.append(FedMLRunner(args, torch.device("cpu"), dataset(), net, **parts).runner)
    runners[0].server.begin(["1"])
    own = [runners[1]._dataset[place][1] for place in (5, 6, 4)]
    reply = runners[1].clients.train("1", runners[0].server.message("1"), *own)
    runners[0].server.receive("1", reply)
    return unpack(reply).payloads


def test_adapters_of_one_rank() -> None:
    assert answered(Adapted(8), Adapted(8))


def test_adapters_of_different_ranks_are_refused_with_both() -> None:
    with pytest.raises(FedParaError, match=r"model has rank 4, the server's has rank 8"):
        answered(Adapted(8), Adapted(4))
    with pytest.raises(FedParaError, match=r"of rank 4, this server sent one of rank 8"):
        answered(Adapted(8), Adapted(4), OwnRank)


@pytest.mark.parametrize("base", ["frozen", "factors"])
def test_updates_of_different_ranks_are_refused_with_both(base: str) -> None:
    """Factors of the plugin, by another gamma."""
    halves = []
    for gamma in (0.6, 0.1):
        args = arguments(fedpara_method="lowrank", fedpara_gamma=gamma, fedpara_base=base)
        halves.append(FedMLRunner(args, torch.device("cpu"), dataset(), model()).runner)
    halves[0].server.begin(["1"])
    own = [halves[1]._dataset[place][1] for place in (5, 6, 4)]
    reply = halves[1].clients.train("1", halves[0].server.message("1"), *own)
    with pytest.raises(
        FedParaError, match=r"this client has .*rank \d+ .* the server has .*rank \d"
    ):
        halves[0].server.receive("1", reply)
