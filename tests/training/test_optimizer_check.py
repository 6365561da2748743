"""Optimizers that were built before a model was converted are found, and no others."""

import warnings

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConversionError


def two_layers():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 2))


def test_an_optimizer_built_before_conversion_is_refused_by_name():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="0.weight, 2.weight"):
        fedpara.convert(model, gamma=0.3)
    with pytest.raises(ConversionError, match=r"2 of its 6 parameters .* 0.weight, 2.weight"):
        fedpara.check_optimizer(model, optimizer)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_that_are_fine(kind):
    model = fedpara.convert(two_layers(), gamma=0.3)
    fedpara.check_optimizer(model, kind(model.parameters(), lr=0.1))
    fedpara.check_optimizer(model, kind(model[3].parameters(), lr=0.1))
    both = [{"params": model.parameters()}, {"params": nn.Linear(3, 3).parameters(), "lr": 1.0}]
    fedpara.check_optimizer(model, kind(both, lr=0.1))
    plain = two_layers()
    fedpara.check_optimizer(plain, kind(plain.parameters(), lr=0.1))


def test_frozen_factors_need_no_optimizer():
    model = fedpara.convert(two_layers(), gamma=0.3)
    for layer in model[:3]:
        layer.requires_grad_(False)
    other = nn.Linear(3, 3)
    fedpara.check_optimizer(
        model, torch.optim.SGD([*model[3].parameters(), *other.parameters()], lr=0.1)
    )


def test_conversion_is_silent_where_no_optimizer_holds_the_weights():
    model = two_layers()
    kept = list(model.parameters())  # alive, and nobody trains them
    other = torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1)
    dropped = two_layers()
    optimizer = torch.optim.SGD(dropped.parameters(), lr=0.1)
    optimizer.itself = optimizer  # only the garbage collector can free it
    del optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fedpara.convert(model, gamma=0.3)
        fedpara.convert(dropped, gamma=0.3)
        single = nn.Linear(64, 64)
        held = torch.optim.SGD(single.parameters(), lr=0.1)
        fedpara.convert(single, gamma=0.3)
    assert kept
    assert other.param_groups
    assert held.param_groups
