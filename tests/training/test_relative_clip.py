"""The clip relative to each factor's norm, against the rule written out."""

import copy
import logging
from math import sqrt

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.factors.planning import usual_deviation
from fedpara_plugins.models import adopt_plans
from harness.oracles.relative_clip import SHARES, clipped, usual_norms

METHODS = ("lowrank", "fedpara", "pfedpara")
UNIT = {"speed": 1.0, "private_speed": 1.0, "variance": "torch"}


def build(method="fedpara", **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(12, 16, 3), nn.GroupNorm(4, 16), nn.Flatten(), nn.Linear(16 * 16, 40)
    )
    options = {"gamma": 0.5, "clip": "relative", **UNIT, **options}
    return fedpara.convert(model, method=method, **options).double()


def loss_of(model, size):
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(4, 12, 6, 6, generator=drawn, dtype=torch.float64)
    return size * (model(x) - 1).square().mean()


def fill_gradients(model, size):
    model.zero_grad()
    loss_of(model, size).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_by_hand(model, gradients, least, share, rate_of):
    """Return all parameters after one step of SGD, and how many gradients the rule has changed."""
    after, acted = {}, 0
    for name, p in model.named_parameters():
        gradient = gradients.get(name, torch.zeros_like(p))
        held = clipped(name, p, gradient, rate=rate_of(name), share=share, norms=least)
        acted += not torch.equal(held, gradient)
        after[name] = p.detach() - rate_of(name) * held
    return after, acted


def assert_moved_as(model, after):
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), after[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [0.3, 30.0, 3e4])
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_the_rule_written_out(method, size):
    model = build(method)
    least = usual_norms(model, method)
    rates = {"0": 0.3, "1": 0.3, "3": 0.05}
    groups = [
        {"params": list(model.get_submodule(place).parameters()), "lr": rate}
        for place, rate in rates.items()
    ]
    optimizer = torch.optim.SGD(groups)
    acted = []
    for _ in range(3):
        gradients = fill_gradients(model, size)
        after, count = step_by_hand(
            model, gradients, least, SHARES[method], lambda name: rates[name[0]]
        )
        acted.append(count)
        optimizer.step()
        assert_moved_as(model, after)
    if size != 0.3:
        assert min(acted) >= 3
    if size == 3e4:
        assert acted[-1] == len(least)


def test_another_share_for_all_factors():
    model = build("pfedpara", clip="relative:0.004")
    gradients = fill_gradients(model, 1e4)
    after, acted = step_by_hand(
        model, gradients, usual_norms(model, "pfedpara"), 0.004, lambda name: 0.1
    )
    assert acted >= 6
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_moved_as(model, after)


def test_layers_of_other_methods_have_their_share():
    model = build("fedpara", overrides={"3": {"method": "pfedpara"}})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fill_gradients(model, 1e6)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    way = {name: float((p - before[name]).norm().detach()) for name, p in model.named_parameters()}
    for name, share in (("0.x1", 0.03), ("0.t2", 0.03), ("3.x1", 0.1), ("3.y1", 0.1)):
        assert way[name] == pytest.approx(share * float(before[name].norm()), rel=0.05)
    assert way["3.bias"] > 1  # no factor
    assert way["1.weight"] > 1


@pytest.mark.parametrize("base", ["factors", "frozen"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dense", [nn.Linear(300, 200), nn.Conv2d(48, 64, 3)])
def test_factors_of_the_usual_deviation_give_the_variance_that_was_planned(dense, method, base):
    """Also those that start at zero: a private operand is then as large as the shared one."""
    torch.manual_seed(0)
    options = {"gamma": 0.3, "speed": 0.7, "private_speed": 0.3, "init": "random"}
    dense = copy.deepcopy(dense)
    layer = fedpara.convert(dense, method=method, base=base, trained="discard", **options)
    plan = layer.plans["weight"]
    factors = {
        name: torch.randn(factor.shape, dtype=torch.float64) * usual_deviation(plan, name)
        for name, factor in layer.factors("weight").items()
    }
    whole = plan.compose(factors)
    private = {n: f * (n not in plan.private_names) for n, f in factors.items()}
    shared = plan.compose(private)
    assert float(shared.var()) == pytest.approx(plan.variance, rel=0.15)
    if plan.private_names:
        assert float((whole - shared).var()) == pytest.approx(plan.variance, rel=0.15)


@pytest.mark.parametrize(
    ("options", "zero"),
    [
        ({"method": "pfedpara"}, ("3.x2", "0.t2")),
        ({"method": "lowrank", "base": "frozen"}, ("3.x1", "0.x1")),
        ({"method": "pfedpara", "base": "frozen"}, ("3.x1", "3.x2", "0.x1")),
    ],
)
def test_a_factor_that_starts_at_zero_is_held_by_its_usual_norm_and_not_by_its_own(options, zero):
    model = build(**options)
    fill_gradients(model, 1e6)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    share = SHARES[options["method"]]
    for name in zero:
        place, factor = name.split(".")
        layer = model.get_submodule(place)
        value = layer.factors("weight")[factor]
        wanted = share * usual_deviation(layer.plans["weight"], factor) * sqrt(value.numel())
        assert float(value.detach().norm()) == pytest.approx(wanted, rel=1e-6)


def test_small_steps_are_the_optimizer_s_own_bit_for_bit():
    model, free = build(), build(clip="none")
    for one in (model, free):
        fill_gradients(one, 0.01)
        torch.optim.SGD(one.parameters(), lr=0.01, momentum=0.9).step()
    for mine, theirs in zip(model.parameters(), free.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_several_optimizers_and_one_act_alike_even_amid_backward(caplog):
    """No other gradient counts for a factor, so that nothing is lost where others are missing."""
    one = build("pfedpara")
    fill_gradients(one, 1e3)
    torch.optim.SGD(one.parameters(), lr=0.1).step()
    several = build("pfedpara")
    fill_gradients(several, 1e3)
    for layer in several:
        if own := list(layer.parameters()):
            torch.optim.SGD(own, lr=0.1).step()
    amid = build("pfedpara")
    for p in amid.parameters():
        optimizer = torch.optim.SGD([p], lr=0.1)
        p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    loss_of(amid, 1e3).backward()
    for mine, second, third in zip(
        one.parameters(), several.parameters(), amid.parameters(), strict=True
    ):
        assert torch.equal(mine, second)
        assert torch.equal(mine, third)
    assert not [r for r in caplog.records if "clip" in r.getMessage()]


class RateOfItsOwn(torch.optim.Optimizer):
    """A step of the gradient, with a rate of 1 that stands in no group, or in a group as None."""

    def __init__(self, params, **group):
        super().__init__(params, group)

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= p.grad


@pytest.mark.parametrize("group", [{}, {"lr": None}, {"lr": torch.tensor(1.0)}])
def test_without_a_rate_in_its_group_an_optimizer_s_rate_counts_as_one(group):
    model = build()
    gradients = fill_gradients(model, 10.0)
    after, acted = step_by_hand(
        model, gradients, usual_norms(model, "fedpara"), 0.03, lambda name: 1.0
    )
    assert acted
    RateOfItsOwn(model.parameters(), **group).step()
    assert_moved_as(model, after)


def test_a_rate_of_zero_and_gradients_of_zero():
    model = build()
    gradients = fill_gradients(model, 1e3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.step()
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters())
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    assert not any(p.grad.any() for p in model.parameters())


def test_sixteen_bits_are_summed_in_float32():
    model = build().half()
    before = {name: p.detach().float() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 5e3)  # no norm of 600 such values is a number of 16 bits
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    way = float((model[3].x1.detach().float() - before["3.x1"]).norm())
    assert way == pytest.approx(0.03 * float(before["3.x1"].norm()), rel=0.05)


def test_a_gradient_that_is_not_finite_is_named_by_its_step(caplog):
    caplog.set_level(logging.WARNING)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for size in (1.0, float("nan"), 1.0):
        fill_gradients(model, size)
        optimizer.step()
    (said,) = [r.getMessage() for r in caplog.records if "clip cannot bound" in r.getMessage()]
    assert "step 2 of this round (SGD)" in said


def test_plans_that_are_taken_over_from_the_server_count():
    model, other = build(), build(variance=0.01)
    fill_gradients(model, 1e6)
    torch.optim.SGD(model.parameters(), lr=0.0).step()  # with the plans that it had
    adopt_plans(model, fedpara.ModelSpec.of(other))
    for one in (model, other):
        fill_gradients(one, 1e6)
        with torch.no_grad():
            one[3].x1.zero_()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
    assert float(model[3].x1.detach().norm()) == pytest.approx(
        float(other[3].x1.detach().norm()), rel=1e-6
    )
