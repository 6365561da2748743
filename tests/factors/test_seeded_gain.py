"""The rescaling of seeded factors: the number that composing in float64 gives, in less time."""

import math

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.factors import seeded_gain
from fedpara_plugins.factors.initialise import seeded_shared
from fedpara_plugins.factors.seeded_gain import (
    DrawnFactors,
    draw_bytes,
    draw_nanoseconds,
    rounded_gain,
)

SHAPES = {
    "matrix": lambda: nn.Linear(300, 260),
    "wide": lambda: nn.Linear(2000, 12),
    "small": lambda: nn.Linear(20, 16),
    "kernel": lambda: nn.Conv2d(48, 64, (3, 5)),
    "line": lambda: nn.Conv1d(20, 24, 5),
}


def plan_of(shape, method, *, tanh=False):
    net = fedpara.convert(
        nn.Sequential(SHAPES[shape]()), method=method, gamma=0.3, min_size=1, tanh=tanh
    )
    (plan,) = fedpara.ModelSpec.of(net).weights.values()
    return plan


def drawn_for(plan, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(plan.factor_shape(name), generator=generator) * plan.factor_std
        for name in plan.factor_names
        if name not in plan.private_names
    }


def by_brute_force(plan, factors, gains=()):
    """Compose the whole weight in float64, private operands at zero."""
    wide = {name: value.double() for name, value in factors.items()}
    for gain in gains:
        wide = {name: value * gain for name, value in wide.items()}
    every = {
        name: wide.get(name, torch.zeros(plan.factor_shape(name)).double())
        for name in plan.factor_names
    }
    variance = float(plan.compose(every).var(unbiased=False))
    gain = (plan.variance / variance) ** (0.5 / len(factors))
    return round(gain * 2**20) / 2**20


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_number_of_float64(shape, method, tanh):
    plan = plan_of(shape, method, tanh=tanh)
    for seed in range(5):
        factors = drawn_for(plan, seed)
        gains = [1.25, 0.9] if seed % 2 else []
        found = rounded_gain(plan, DrawnFactors(dict(factors), gains))
        assert found == by_brute_force(plan, factors, gains), (shape, seed)


def test_float32_decides_only_where_it_is_certain(monkeypatch):
    """Near the point where the rounding changes, or where products are not those of float32."""
    plan = plan_of("matrix", "fedpara")
    used, sums = [], seeded_gain._sums

    def watched(plan, factors, cast):
        used.append(cast.__name__)
        return sums(plan, factors, cast)

    monkeypatch.setattr(seeded_gain, "_sums", watched)
    for seed in range(40):
        factors = drawn_for(plan, seed)
        used.clear()
        found = rounded_gain(plan, DrawnFactors(dict(factors)))
        assert found == by_brute_force(plan, factors)
        exact = by_brute_force(plan, factors)
        assert math.isclose(found, exact, abs_tol=0)
        assert used in (["near"], ["near", "exact"])
    monkeypatch.setattr(seeded_gain, "SURE", 0.5)
    used.clear()
    rounded_gain(plan, DrawnFactors(drawn_for(plan)))
    assert used == ["near", "exact"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    used.clear()
    rounded_gain(plan, DrawnFactors(drawn_for(plan)))
    assert used == ["exact"]


def test_values_beyond_float32_are_computed_in_float64():
    plan = plan_of("matrix", "fedpara")
    factors = {name: value * 1e12 for name, value in drawn_for(plan).items()}
    assert rounded_gain(plan, DrawnFactors(dict(factors))) == by_brute_force(plan, factors)
    nothing = {name: value * 0 for name, value in factors.items()}
    assert rounded_gain(plan, DrawnFactors(nothing)) == 1.0


def test_passes_end_when_nothing_changes_any_more(monkeypatch):
    plan = plan_of("matrix", "fedpara", tanh=True)
    calls, gain = [], seeded_gain.rounded_gain
    monkeypatch.setattr(
        "fedpara_plugins.factors.initialise.rounded_gain",
        lambda *args: calls.append(1) or gain(*args),
    )
    seeded_shared(plan, seed=0, key="weight")
    assert 1 < len(calls) <= 8


def test_no_tile_of_a_weight_is_large(monkeypatch):
    """A weight of 4 million entries and its core's product are never held as a whole."""
    sizes, tile = [], seeded_gain._tile

    def watched(*args):
        found = tile(*args)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(seeded_gain, "_tile", watched)
    net = nn.Sequential(nn.Conv2d(256, 256, 8), nn.Linear(2048, 2048))
    fedpara.convert(net, method="fedpara", gamma=0.02)
    for name, plan in fedpara.ModelSpec.of(net).weights.items():
        sizes.clear()
        seeded_shared(plan, seed=0, key=name)
        assert sum(sizes) in (math.prod(plan.shape), 2 * math.prod(plan.shape))
        assert max(sizes) <= seeded_gain.BLOCK_ENTRIES


def test_estimates_grow_with_the_work():
    costs = [draw_nanoseconds(plan_of("matrix", m)) for m in ("pfedpara", "lowrank", "fedpara")]
    assert costs == sorted(costs)
    assert draw_nanoseconds(plan_of("matrix", "fedpara", tanh=True)) > 2 * costs[-1]
    assert draw_bytes(plan_of("kernel", "fedpara")) > draw_bytes(plan_of("matrix", "fedpara"))
