"""Weight decay with the gradient at zero: the composed weight shrinks as a dense one would."""

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara

OPTIMIZERS = {
    "SGD": {},
    "SGD, maximize": {"maximize": True},
    "SGD, foreach": {"foreach": True},
    "AdamW": {},
    "AdamW, maximize": {"maximize": True},
    "AdamW, fused": {"fused": True},
    "Adafactor": {},
    "Muon": {},
    "NAdam, decoupled": {"decoupled_weight_decay": True},
}


def built(name, parameters):
    kind = getattr(torch.optim, name.partition(",")[0], None)
    if kind is None:
        pytest.skip(f"torch {torch.__version__} has no such optimizer")
    return kind(parameters, lr=0.1, weight_decay=0.5, **OPTIMIZERS[name])


def one_step(name, parameters):
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    built(name, parameters).step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["lowrank", "fedpara"])
def test_as_much_as_dense(name, method):
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Linear(64, 64, bias=False), method=method, gamma=0.3)
    dense = nn.Parameter(layer.weight.detach().clone())
    before = dense.detach().clone()
    one_step(name, layer.parameters())
    one_step(name, [dense])
    share = float((dense.detach() / before).mean())
    assert share == pytest.approx(0.95, abs=0.001)
    # What is part of the gradient is taken to first order in the learning rate.
    torch.testing.assert_close(layer.weight.detach(), dense, rtol=2e-3, atol=1e-6)


def test_maximize_climbs_as_minimizing_the_negative_descends():
    states = []
    for maximize in (False, True):
        torch.manual_seed(0)
        layer = fedpara.convert(nn.Linear(64, 64), gamma=0.3)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5, maximize=maximize)
        loss = layer(torch.ones(2, 64)).square().mean()
        (-loss if maximize else loss).backward()
        optimizer.step()
        states.append(layer.state_dict())
    torch.testing.assert_close(states[1], states[0])
