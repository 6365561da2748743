"""Gradient clipping and the decoupled schedule, through the user's own optimizer."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.layers.base import layers_alive
from fedpara_plugins.training.step_hooks import round_progress, start_round


def build(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 40))
    defaults = {"method": "pfedpara", "gamma": 0.5, "clip": "none"}
    return fedpara.convert(model, **{**defaults, **options})


def step(model, optimizer, size=1.0):
    x = torch.linspace(-1, 1, 5 * 64).reshape(5, 64)
    optimizer.zero_grad()
    (size * (model(x) - 3).square().mean()).backward()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer.step()
    return {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}


def private(names):
    return {name for name in names if name.endswith(("x2", "y2"))}


def test_clip_bounds_the_step():
    model = build(clip=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    step(model, optimizer, size=1000.0)
    moved = sum((p - before[k]).square().sum() for k, p in model.named_parameters()).sqrt()
    assert moved.item() == pytest.approx(0.5, rel=1e-3)
    free = build()
    step(free, torch.optim.SGD(free.parameters(), lr=1.0), size=1000.0)
    assert sum((p - before[k]).square().sum() for k, p in free.named_parameters()).sqrt() > 100


def test_other_models_and_optimizers_are_left_alone():
    build(clip=1e-6)
    plain = nn.Linear(64, 40)
    other = torch.optim.SGD(plain.parameters(), lr=1.0)
    before = plain.weight.detach().clone()
    step(plain, other, size=1000.0)
    assert (plain.weight - before).norm() > 1


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_decoupled_steps_first_private_then_shared(optimizer):
    model = build(schedule="decoupled", private_steps=3)
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    optimizer = getattr(torch.optim, optimizer)(
        model.parameters(), lr=0.05, weight_decay=0.1, **options
    )
    for number in range(6):
        moved = step(model, optimizer)
        assert moved == (private(moved) if number < 3 else moved - private(moved))
        assert moved
    start_round(model, previous_steps=6)
    assert step(model, optimizer) == private(dict(model.named_parameters()))


def test_private_steps_see_the_shared_half_and_shared_steps_do_not_see_the_private_one():
    model = build(schedule="decoupled", private_steps=1)
    with torch.no_grad():
        model[0].x2.normal_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plan = model[0].plans["weight"]
    w1, w2 = model[0].x1 @ model[0].y1.T, model[0].x2 @ model[0].y2.T
    torch.testing.assert_close(model[0].weight, plan.scale * w1 * (w2 + 1))
    step(model, optimizer)
    torch.testing.assert_close(model[0].weight, plan.scale * w1)
    model.eval()
    torch.testing.assert_close(model[0].weight, plan.scale * w1 * (w2 + 1))


def test_the_dense_export_has_both_halves_in_every_phase():
    model = build(schedule="decoupled", private_steps=1)
    with torch.no_grad():
        model[0].x2.normal_()
    expected = fedpara.to_dense(model)[0].weight
    step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert round_progress(model).phase == "shared"
    torch.testing.assert_close(fedpara.to_dense(model)[0].weight, expected)


def test_number_of_private_steps():
    model = build(schedule="decoupled", private_steps=0.25, first_private_steps=7)
    assert round_progress(model).private_steps == 7
    start_round(model, previous_steps=40)
    assert round_progress(model).private_steps == 10
    start_round(model, previous_steps=1)
    assert round_progress(model).private_steps == 1


def test_survives_copies():
    model = build(schedule="decoupled", private_steps=2, clip=1.0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        moved = step(other, torch.optim.SGD(other.parameters(), lr=0.1))
        assert moved == private(moved)
        assert round_progress(model).steps == 0


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_shrinks_the_composed_weight_like_a_dense_one(method, optimizer):
    """Without a gradient only the decay is left, and it is known what that does to a weight."""
    lr, decay, steps = 0.1, 0.2, 5
    model = build(method=method)
    opt = optimizer(model.parameters(), lr=lr, weight_decay=decay)
    before = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        opt.step()
    for layer, weight in zip((model[0], model[2]), before, strict=True):
        torch.testing.assert_close(
            layer.weight, weight * (1 - lr * decay) ** steps, rtol=2e-3, atol=1e-5
        )


def test_decay_of_factors_as_an_option():
    model = build(method="fedpara", decay="factors")
    before = model[0].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.2).step()
    torch.testing.assert_close(model[0].weight, before * (1 - 0.1 * 0.2) ** 4)


def test_models_without_options_for_steps_are_left_alone_by_their_closure():
    model = build(method="fedpara", decay="factors")
    twin = copy.deepcopy(model)
    for layer in (twin[0], twin[2]):
        layers_alive.discard(layer)
    for other in (model, twin):
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1, weight_decay=0.1)

        def closure(other=other, optimizer=optimizer):
            optimizer.zero_grad()
            value = other(torch.ones(2, 64)).square().mean()
            value.backward()
            return value

        optimizer.step(closure)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_without_the_options_a_step_is_the_optimizer_s_own():
    model = build()
    twin = copy.deepcopy(model)
    for layer in (twin[0], twin[2]):
        layers_alive.discard(layer)
    for other in (model, twin):
        step(other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not round_progress(build(method="fedpara", schedule="decoupled")).decoupled
    assert round_progress(nn.Linear(2, 2)) is None
    assert round_progress(fedpara.to_dense(build(clip=1.0))) is None
    assert set(vars(fedpara.to_dense(build(clip=1.0))[0])) == set(vars(nn.Linear(2, 2)))
