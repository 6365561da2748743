"""A server that fits factors to large weights, and clients in other processes that hold others."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
from torch import nn

from fedpara_plugins import ModelSpec, convert
from harness.fedml.project import model
from harness.fedml.threads import Parties

ROUNDS = 2


class Kept(DefaultServerAggregator):
    """FedML's aggregator, which shows the weights at the start and at the end."""

    first: OrderedDict[str, Any] | None
    last: OrderedDict[str, Any]

    def get_model_params(self) -> OrderedDict[str, Any]:
        state = OrderedDict((k, v.clone()) for k, v in super().get_model_params().items())
        if type(self).first is None:
            type(self).first = state
        return state

    def on_after_aggregation(self, aggregated: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
        type(self).last = aggregated = super().on_after_aggregation(aggregated)
        return aggregated


def trained() -> nn.Module:
    """Return the model with weights that are large against their kind's default."""
    net = model()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12.0)
    return net


@pytest.mark.filterwarnings("ignore:init='fit'")
@pytest.mark.parametrize(
    ("method", "local"),
    [("lowrank", "factors"), ("pfedpara", "factors"), ("pfedpara", "dense")],
)
def test_clients_take_over_the_plans_of_the_server_s_weights(
    monkeypatch: pytest.MonkeyPatch, method: str, local: str
) -> None:
    keys = {
        **{"fedpara_method": method, "fedpara_gamma": 0.5, "fedpara_min_size": 0},
        **{"fedpara_init": "fit", "fedpara_codec": "none", "fedpara_local": local},
        **{"comm_round": ROUNDS, "learning_rate": 0.0},
    }
    options = {"method": method, "gamma": 0.5, "min_size": 0, "init": "fit"}
    fitted, fresh = (convert(net, **options) for net in (trained(), model()))
    assert ModelSpec.of(fitted).fingerprint != ModelSpec.of(fresh).fingerprint
    Kept.first = None
    parties = Parties(monkeypatch, keys=keys, aggregator=Kept, models={0: trained}).run()
    assert not parties.errors
    assert not parties.ended
    # Nobody has learned anything, so what came back from all is what the server has fitted.
    assert Kept.first is not None
    assert Kept.first.keys() == fitted.state_dict().keys()
    for name in ModelSpec.of(fitted).shared_keys:
        torch.testing.assert_close(Kept.last[name], Kept.first[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:init='fit'")
def test_other_differences_are_refused_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"fedpara_method": "lowrank", "fedpara_gamma": 0.5, "fedpara_min_size": 0}
    keys |= {"fedpara_init": "fit", "comm_round": ROUNDS}
    other = {rank: {"fedpara_gamma": 0.3} for rank in (1, 2)}
    parties = Parties(monkeypatch, keys=keys, of_rank=other, models={0: trained}).run()
    assert any("differ" in str(error) for error in parties.errors.values())
