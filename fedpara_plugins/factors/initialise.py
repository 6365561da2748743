"""Initial values of factors, set by the composed weight's variance, never by ``kaiming_*``.

The published recipes set each factor's variance on its own, and miss the composed weight's variance
by up to four orders of magnitude. Here the composed weight has exactly the variance of its plan.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.seeded_gain import (
    BLOCK_ENTRIES,
    TANH_PASSES,
    DrawnFactors,
    rounded_gain,
)

__all__ = ["initial_factors", "initial_private", "seeded_normal", "seeded_shared", "start_gains"]

PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Dtype and device of every draw. The defaults of the user's process must not matter, since all
sides must draw the same values."""

SEEDED_BITS = 7
"""Seeded shared factors are multiples of a power of two that lies at least this many bits below
their standard deviation. Later states then differ from them by short integers (`stages.grid`)."""


def initial_factors(plan: WeightPlan, *, seed: int, key: str) -> dict[str, Tensor]:
    """Draw all factors of a weight, float32, on the CPU.

    Shared factors come from torch's global random generator, as in every layer of torch; private
    ones come from `initial_private`. After the draw all shared factors are rescaled by one number,
    so that the composed weight's variance is ``plan.variance`` whatever the rank.

    Args:
        plan: the weight's plan.
        seed: the seed of the private factors.
        key: the weight's name in the model; it makes the private factors of two layers differ.

    Returns:
        Factors by name.
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
    # Without tanh the variance is an exact power of the factors' size, so one pass is enough.
    for _ in range(TANH_PASSES if plan.tanh else 1):
        drawn = plan.compose(factors).double().var(unbiased=False).item()
        for factor in shared:
            factor.mul_((plan.variance / drawn) ** (0.5 / len(shared)))
    return {**factors, **_started(plan, factors)}


def _started(plan: WeightPlan, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return X and Y of the first shared operand for ``plan.start``; nothing for a start of 1."""
    changed = {name: factors[name] * gain for name, gain in start_gains(plan).items()}
    if plan.tanh and plan.start > 0:
        for x in list(changed)[:1]:
            for _ in range(TANH_PASSES):
                reached = _variance(plan, {**factors, **changed})
                if reached <= 0:  # a stranger's description may start below any number
                    break
                changed[x] = changed[x] * math.sqrt(plan.start**2 * plan.variance / reached)
    return changed


def start_gains(plan: WeightPlan) -> dict[str, float]:
    """Return what X and Y of the first shared operand are multiplied by for ``plan.start``.

    The composed weight shrinks by the start r, and its speed K stays. Each of F shared factors has
    the share K/F in the fresh weight's K. With X multiplied by r/g and Y by g, K stays if
    g² + r²/g² + (F - 2) r² = F. For a start of zero, X is zero and Y alone moves the weight. (Under
    tanh this holds where the weight stays far from the bound.)

    Returns:
        Factors by the names of X and Y; none for a start of 1.
    """
    if plan.start == 1:
        return {}
    names = [name for name in plan.factor_names if name not in plan.private_names]
    square = plan.start**2
    wanted = len(names) - (len(names) - 2) * square
    gain = math.sqrt((wanted + math.sqrt(wanted**2 - 4 * square)) / 2)
    return {names[0]: plan.start / gain, names[1]: gain}


def initial_private(plan: WeightPlan, *, seed: int, key: str) -> dict[str, Tensor]:
    """Return the private factors' initial values, float32, equal on every device for one seed.

    One factor of the operand is zero; the others are normal with standard deviation
    ``plan.private_std``. The private operand is then zero, but its gradient is not.

    Args:
        plan: the weight's plan.
        seed: the seed of the private factors.
        key: the weight's name in the model.
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
    """Return shared factors that every side can derive from a seed, float32, on the CPU.

    They are made as in `initial_factors`, but the draw of each factor is seeded by the factor's own
    name, and the values are rounded to a grid (see `SEEDED_BITS`). The same seed gives the same
    bits with the same version of torch on the same kind of processor. Elsewhere, compare hashes
    before you rely on it.

    Args:
        plan: the weight's plan.
        seed: the seed of all factors.
        key: the full name of the dense weight in the model.
    """
    factors = DrawnFactors(
        {
            name: seeded_normal(
                plan.factor_shape(name), std=plan.factor_std, seed=seed, key=f"{key}.{name}"
            )
            for name in plan.factor_names
            if name not in plan.private_names
        }
    )
    for _ in range(TANH_PASSES if plan.tanh else 1):
        gain = rounded_gain(plan, factors)
        if gain == 1.0:  # and so would be that of every further pass
            break
        factors.gains.append(gain)
    drawn, gains = factors.drawn, start_gains(plan)
    if plan.tanh and 0 < plan.start < 1:
        return _started_under_tanh(plan, factors)
    return {
        name: _on_grid(
            drawn[name],
            plan.factor_std * gains.get(name, 1),
            partial(_multiplied, factors.exact, gains.get(name, 1)),
        )
        for name in drawn
    }


def _multiplied(exact: Callable[[Tensor], Tensor], gain: float, values: Tensor) -> Tensor:
    found = exact(values)
    return found if gain == 1 else found.mul_(gain)


def _started_under_tanh(plan: WeightPlan, factors: DrawnFactors) -> dict[str, Tensor]:
    """Return the factors of `seeded_shared` where the start is a matter of several passes."""
    drawn, gains = factors.drawn, start_gains(plan)
    exact = {name: factors.exact(drawn.pop(name)) for name in list(drawn)}
    # A private operand is zero at first, whatever its other factor: none has to be drawn.
    nothing = torch.zeros((), dtype=torch.float64, device="cpu")
    private = {name: nothing.expand(plan.factor_shape(name)) for name in plan.private_names}
    exact |= _started(plan, {**exact, **private})
    return {
        name: _on_grid(exact.pop(name), plan.factor_std * gains.get(name, 1), torch.clone)
        for name in list(exact)
    }


def _on_grid(drawn: Tensor, std: float, exact: Callable[[Tensor], Tensor]) -> Tensor:
    """Round a factor to the grid of its standard deviation; without one it is zero.

    Args:
        drawn: the factor; overwritten if it is float32.
        std: of its values.
        exact: returns some of the values as float64.
    """
    if std == 0:
        return torch.zeros(drawn.shape, **PLAIN)
    step = 2.0 ** math.floor(math.log2(std) - SEEDED_BITS)
    rounded = drawn if drawn.dtype == torch.float32 else torch.empty(drawn.shape, **PLAIN)
    pieces = (torch.split(x.view(-1), BLOCK_ENTRIES) for x in (drawn, rounded))
    for values, into in zip(*pieces, strict=True):
        # Rounding makes negative zeros; adding 0.0 turns them into positive ones.
        into.copy_(exact(values).div_(step).round_().mul_(step).add_(0.0))
    return rounded


def _variance(plan: WeightPlan, factors: Mapping[str, Tensor]) -> float:
    """Return the composed weight's variance, from blocks of rows: it may not fit into memory."""
    step = max(1, BLOCK_ENTRIES // math.prod(plan.shape[1:]))
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    for start in range(0, plan.shape[0], step):
        part = {n: x[start : start + step] if n[0] == "x" else x for n, x in factors.items()}
        rows = plan.compose_rows(part)
        sums += torch.stack([rows.sum(), rows.square().sum()])
    mean, square = (sums / math.prod(plan.shape)).tolist()
    return float(square - mean * mean)


def seeded_normal(shape: tuple[int, ...], *, std: float, seed: int, key: str) -> Tensor:
    """Draw normal values, float32, on the CPU; one seed and key give the same values everywhere."""
    generator = torch.Generator("cpu").manual_seed(_seed_of(seed, key))
    return torch.randn(shape, generator=generator, **PLAIN).mul_(std)


def _seed_of(seed: int, key: str) -> int:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
