"""Factors that are fitted to weights of any size: close, and as fast as fresh ones."""

from contextlib import nullcontext

import pytest
import torch
from jacobian_speed import jacobian_speed
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.factors.fit import fit_weight
from fedpara_plugins.factors.initialise import initial_factors

METHODS = ("lowrank", "fedpara", "pfedpara")
LAYERS = {
    "linear": lambda: nn.Linear(24, 20),
    "conv": lambda: nn.Conv2d(12, 10, 3),
    "embedding": lambda: nn.Embedding(40, 16),
}


def fitted(kind, method, std, tanh=False, **options):
    torch.manual_seed(0)
    dense = LAYERS[kind]()
    nn.init.normal_(dense.weight, std=std)
    weight = dense.weight.detach().clone()
    with pytest.warns(UserWarning, match="init='fit'") if std else nullcontext():
        layer = fedpara.convert(
            dense, method=method, gamma=0.3, min_size=0, init="fit", tanh=tanh, **options
        )
    return layer, weight


@pytest.mark.parametrize("std", [0.0, 1e-7, 1e-4, 0.144, 3.0])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_speed_of_a_fitted_weight_is_the_option_s(kind, method, std):
    layer, _ = fitted(kind, method, std, speed=0.4)
    factors = {n: f.detach().double() for n, f in layer.factors("weight").items()}
    assert jacobian_speed(layer, factors) == pytest.approx(0.4, rel=1e-3)
    assert layer.fit_speeds["weight"] == pytest.approx(0.4, rel=1e-3)
    assert "K 0.40" in str(fedpara.report(layer))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_error_does_not_depend_on_the_size_of_the_weight(kind, method):
    errors = []
    for std in (1e-4, 0.05, 1.0, 30.0):
        layer, weight = fitted(kind, method, std)
        errors.append(float((layer.composed_weight("weight") - weight).norm() / weight.norm()))
        assert layer.fit_errors["weight"] == pytest.approx(errors[-1], rel=1e-3)
    assert max(errors) < 1.05 * min(errors)
    assert errors[0] < 0.95


def test_an_embedding_is_fitted_better_than_by_low_rank():
    """The descent used to end where it began, at low rank, for weights of variance 1."""
    layer, weight = fitted("embedding", "fedpara", 1.0)
    rank = layer.plans["weight"].rank
    singular = torch.linalg.svdvals(weight)
    best = float(singular[rank:].norm() / singular.norm())
    assert layer.fit_errors["weight"] < 0.95 * best


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_zero_weight_stays_zero_and_trains(kind, method, tanh):
    """LoRA's B, zero-initialised heads, adaLN-zero."""
    layer, _ = fitted(kind, method, 0.0, tanh=tanh)
    assert not layer.composed_weight("weight").any()
    assert layer.fit_errors["weight"] == 0
    target = torch.randn(layer.plans["weight"].shape)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (layer.composed_weight("weight") - 0.03 * target).square().sum() / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_tanh_is_fitted_at_every_size_too(method):
    for std in (0.01, 2.0):
        layer, weight = fitted("linear", method, std, tanh=True)
        assert layer.fit_speeds["weight"] == pytest.approx(1.0, rel=1e-3)
        assert (layer.weight - weight).norm() < 0.95 * weight.norm()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fits_whatever_mode_the_caller_is_in(mode):
    torch.manual_seed(0)
    weight = torch.randn(40, 48)
    layer = fedpara.convert(nn.Linear(48, 40), method="fedpara", gamma=0.3)
    plan = layer.plans["weight"]
    first = initial_factors(plan, seed=0, key="w")
    torch.manual_seed(1)
    expected = fit_weight(plan, weight, first)
    torch.manual_seed(1)
    with mode():
        found = fit_weight(plan, weight.clone(), first)
    assert found.error == pytest.approx(expected.error, rel=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_private_factors_are_those_that_every_side_derives(kind):
    layer, _ = fitted(kind, "pfedpara", 3.0)
    state = layer.state_dict()
    first = fedpara.ModelSpec.of(layer).initial_private()
    assert first
    assert all(torch.equal(state[name], value) for name, value in first.items())
