"""K of factors, against the whole Jacobian."""

import pytest
import torch
from jacobian_speed import jacobian_speed
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.factors.initialise import initial_factors
from fedpara_plugins.factors.planning import stated_speed, with_variance
from fedpara_plugins.factors.speed import reached_speed, slowest_speed, with_stated_speed
from fedpara_plugins.testing.brute_force import reference_weight

METHODS = ("lowrank", "fedpara", "pfedpara")
LAYERS = {"matrix": lambda: nn.Linear(13, 11), "kernel": lambda: nn.Conv2d(9, 8, (2, 3))}


def layer_of(kind, method, tanh, **options):
    torch.manual_seed(0)
    return fedpara.convert(
        LAYERS[kind](), method=method, rank=2, min_size=0, tanh=tanh, **options
    ).double()


def scattered(layer):
    return {n: torch.randn_like(f) * 0.7 for n, f in layer.factors("weight").items()}


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_speed_is_the_mean_square_of_the_jacobian(kind, method, tanh):
    layer = layer_of(kind, method, tanh)
    factors = scattered(layer)
    expected = jacobian_speed(layer, factors)
    assert reached_speed(layer.plans["weight"], factors) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_speed_is_summed_over_blocks_of_rows(method, monkeypatch):
    layer = layer_of("kernel", method, False)
    factors = scattered(layer)
    whole = reached_speed(layer.plans["weight"], factors)
    monkeypatch.setattr("fedpara_plugins.factors.speed.BLOCK_ENTRIES", 9 * 6 * 3)
    assert reached_speed(layer.plans["weight"], factors) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_sizes_within_an_operand_give_the_stated_speed_and_the_same_weight(kind, method, tanh):
    layer = layer_of(kind, method, tanh)
    plan = layer.plans["weight"]
    factors = {n: f * plan.factor_std / 2 for n, f in scattered(layer).items()}
    factors["x1"] = factors["x1"] * 1e-3
    assert slowest_speed(plan, factors) < stated_speed(plan)
    changed = with_stated_speed(plan, factors)
    torch.testing.assert_close(
        reference_weight(layer, "weight", changed), reference_weight(layer, "weight", factors)
    )
    assert jacobian_speed(layer, changed) == pytest.approx(stated_speed(plan), rel=1e-6)


def test_factors_that_are_too_fast_stay_as_they_are():
    layer = layer_of("matrix", "fedpara", False)
    factors = {n: f * 30 for n, f in scattered(layer).items()}
    changed = with_stated_speed(layer.plans["weight"], factors)
    assert all(torch.equal(changed[name], factors[name]) for name in factors)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["matrix", "kernel"])
def test_a_plan_of_another_variance_is_the_one_that_the_option_gives(kind, method, tanh):
    options = {"speed": 0.7, "private_speed": 0.3}
    plan = layer_of(kind, method, tanh, variance=0.5, **options).plans["weight"]
    other = layer_of(kind, method, tanh, variance=0.002, **options).plans["weight"]
    found = with_variance(plan, 0.002)
    for name in ("scale", "factor_std", "private_std", "variance"):
        assert getattr(found, name) == pytest.approx(getattr(other, name), rel=1e-7)
    assert stated_speed(found) == pytest.approx(0.7, rel=1e-7)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_fresh_factors_have_the_stated_speed(method, tanh):
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Linear(120, 96), method=method, rank=9, speed=0.4, tanh=tanh)
    plan = layer.plans["weight"]
    found = reached_speed(plan, initial_factors(plan, seed=0, key="w"))
    assert found == pytest.approx(0.4, rel=0.05)
