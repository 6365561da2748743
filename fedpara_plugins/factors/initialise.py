"""First values of factors: by variance, never by ``kaiming_*`` on a factor.

The published recipes set each factor's variance on its own and miss the composed weight's by up to
four orders of magnitude. Here the composed weight has exactly the variance of its plan.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedpara_plugins.factors.plan import WeightPlan

__all__ = ["initial_factors", "initial_private", "seeded_normal", "seeded_shared"]

TANH_PASSES = 8

PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Whatever default dtype and device the user's process has: all sides must draw alike."""

SEEDED_BITS = 7
"""Seeded shared factors are multiples of a power of two, at least this many bits below their
standard deviation: later states then differ from them by short integers (`codecs.grid`)."""

GAIN_BITS = 20
"""To which the rescaling of seeded factors is rounded, so that the order of summation, which the
number of threads decides, does not show in them."""


PART = 2**20
"""Entries of a composed weight that are computed at a time, where no row has more."""


def initial_factors(plan: WeightPlan, *, seed: int, key: str) -> dict[str, Tensor]:
    """Draw all factors of a weight, float32, on the CPU.

    Shared factors come from torch's global random generator, as in every layer of torch; private
    ones from `initial_private`. After the draw the shared factors are rescaled together, so that
    the composed weight's variance is ``plan.variance`` whatever the rank.

    Args:
        plan: the weight's plan.
        seed: of the private factors.
        key: name of the weight in the model, which makes private factors of layers differ.
    """
    private = initial_private(plan, seed=seed, key=key)
    factors: dict[str, Tensor] = {}
    for name in plan.factor_names:
        shape = plan.factor_shape(name)
        factors[name] = (
            private[name]
            if name in private
            else torch.empty(shape, **PLAIN).normal_(std=plan.factor_std)
        )
    shared = [factors[name] for name in plan.factor_names if name not in private]
    # Without tanh the variance is an exact power of the factors' size and one pass is enough.
    for _ in range(TANH_PASSES if plan.tanh else 1):
        drawn = plan.compose(factors).double().var(unbiased=False).item()
        for factor in shared:
            factor.mul_((plan.variance / drawn) ** (0.5 / len(shared)))
    return factors


def initial_private(plan: WeightPlan, *, seed: int, key: str) -> dict[str, Tensor]:
    """The private factors' first values, float32, the same on every device with the same seed.

    One factor of the operand is zero, the others are normal with ``plan.private_std``: the
    private operand is zero and yet has a gradient.
    """
    factors = {}
    for name in plan.private_names:
        shape = plan.factor_shape(name)
        if plan.zero_at_start(name):
            factors[name] = torch.zeros(shape, **PLAIN)
        else:
            factors[name] = seeded_normal(
                shape, std=plan.private_std, seed=seed, key=f"{key}.{name}"
            )
    return factors


def seeded_shared(plan: WeightPlan, *, seed: int, key: str) -> dict[str, Tensor]:
    """The shared factors' first values that anyone can derive, float32, on the CPU.

    As in `initial_factors`, with the draw of each factor seeded by its own name, and rounded to a
    grid (see `SEEDED_BITS`). The same seed gives the same bits with the same version of torch on
    the same kind of processor; elsewhere compare hashes before relying on it.

    Args:
        plan: the weight's plan.
        seed: of all factors.
        key: full name of the dense weight in the model.
    """
    drawn = {
        name: seeded_normal(
            plan.factor_shape(name), std=plan.factor_std, seed=seed, key=f"{key}.{name}"
        ).double()
        for name in plan.factor_names
        if name not in plan.private_names
    }
    private = initial_private(plan, seed=seed, key=key)
    for _ in range(TANH_PASSES if plan.tanh else 1):
        factors = {**drawn, **{name: value.double() for name, value in private.items()}}
        variance = _variance(plan, factors)
        gain = (plan.variance / variance) ** (0.5 / len(drawn)) if variance > 0 else 1.0
        gain = round(gain * 2**GAIN_BITS) / 2**GAIN_BITS
        drawn = {name: value * gain for name, value in drawn.items()}
    step = 2.0 ** math.floor(math.log2(plan.factor_std) - SEEDED_BITS)
    # The sum turns the negative zeros that rounding makes into ordinary ones.
    return {name: ((value / step).round() * step + 0.0).float() for name, value in drawn.items()}


def _variance(plan: WeightPlan, factors: Mapping[str, Tensor]) -> float:
    """Of the composed weight's entries, some rows at a time: all of them may not fit the memory."""
    step = max(1, PART // math.prod(plan.shape[1:]))
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, plan.shape[0], step):
        part = {n: x[start : start + step] if n[0] == "x" else x for n, x in factors.items()}
        rows = plan.compose_rows(part)
        sums += torch.stack([rows.sum(), rows.square().sum()])
    mean, square = (sums / math.prod(plan.shape)).tolist()
    return float(square - mean * mean)


def seeded_normal(shape: tuple[int, ...], *, std: float, seed: int, key: str) -> Tensor:
    """Normal values, float32, on the CPU: the same for everyone with the same seed and key."""
    generator = torch.Generator("cpu").manual_seed(_seed_of(seed, key))
    return torch.randn(shape, generator=generator, **PLAIN) * std


def _seed_of(seed: int, key: str) -> int:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
