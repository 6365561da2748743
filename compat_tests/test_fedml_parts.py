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

from fedpara_plugins import ConversionError
from fedpara_plugins_fedml.messages.envelope import unpack
from harness.fedml.project import run
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
