"""The new factors of a weight that was trained as an ordinary dense one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedpara_plugins.factors.fast.conditions import without_autocast
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.projection.least_squares import ITERATIONS, solve
from fedpara_plugins.factors.projection.tangent import Factors, Tangent

__all__ = ["Projected", "project", "scale_for"]

LARGEST_SCALE = 50.0
SMALLEST_SHARE = 1e-3

OVERSHOOT = 1.05
"""Largest movement of a weight along V, relative to the movement in training."""

OF_WEIGHT, OF_UPDATE = 0.75, 0.5
"""Largest movement of a weight in all: the larger of these shares of |W| and of |V|.

Besides V, a rescaled step contains what factors cannot separate from V (in the square, 1 / kept
share as large), and terms of second and higher order, which the Jacobian does not contain. Both do
no harm while they are small relative to the weight. Measured with the three methods on digits, for
|V| of 0.02 to 2 times |W| (`benchmarks/projection_length.py`): the step of least loss moved weights
by 0.5 to 0.8 |W| where |V| was 0.5 to 0.9 |W|, and by about |V| / 2 where |V| was twice |W|. There
the whole step ended in losses of 8 to 960.
"""

SMALL = 1e-3
"""Share of |W| up to which V is followed as it is. Terms of second order are negligible there, and
the difference of two composed weights can be mostly rounding."""

HALVINGS, REFINEMENTS = 60, 4
"""Largest number of halvings of a step that goes too far, and of bisections after them."""


class Projected(NamedTuple):
    """The result of `project`.

    Attributes:
        factors: the new factors by name, in the dtypes and on the devices of the old ones.
        kept: the share of the update that the projection kept before it was rescaled; None if the
            weight has not changed.
    """

    factors: Factors
    kept: float | None


@torch.no_grad()
def project(
    plan: WeightPlan,
    factors: Mapping[str, Tensor],
    before: Tensor,
    after: Tensor,
    *,
    iterations: int = ITERATIONS,
) -> Projected:
    """Move factors as far as they can follow the movement of a dense weight.

    The movement d is one Gauss-Newton step: it minimises |J d - V|², where V = after - before and J
    is the Jacobian of the weight by all its factors, private ones included. On every client factors
    keep a share of |V|² that is about their share of the weight's dimensions, so an unscaled step
    would be too small by that share. Therefore d is multiplied by `scale_for` of the kept share; to
    first order, the weight then moves along V as far as it did in training. If the composed weight
    shows that this is too far (after many steps, or large ones), the step is shortened; see
    `OVERSHOOT` and `OF_WEIGHT`.

    Args:
        plan: the weight's plan.
        factors: the factors before training.
        before: the weight before training, shape ``plan.shape``.
        after: the weight after training, finite.
        iterations: of conjugate gradients.

    Returns:
        The new factors; the old ones themselves if ``after`` equals ``before``.
    """
    wide = _working_dtype(*factors.values(), before, after)
    device = next(iter(factors.values())).device
    change = after.to(device, wide) - before.to(device, wide)
    largest = float(change.abs().max())
    if largest == 0:
        return Projected(dict(factors), None)
    # Scaled to size 1, so that squares of tiny or huge changes stay in the dtype's range.
    wanted = (change / largest).flatten(1)
    tangent = Tangent(plan, {name: value.to(wide) for name, value in factors.items()})
    moves, kept = solve(tangent, wanted, iterations=iterations)
    step = {name: scale_for(kept) * largest * move for name, move in moves.items()}
    start = {name: value.to(wide) for name, value in factors.items()}
    length = _step_length(plan, start, step, change)
    moved = {
        name: (start[name] + length * step[name]).to(value.dtype) for name, value in factors.items()
    }
    return Projected(moved, kept)


def _step_length(plan: WeightPlan, start: Factors, step: Factors, change: Tensor) -> float:
    """Return the share of a step that does not move the composed weight too far; 1 if all may."""
    with without_autocast(change.device.type):
        weight = plan.compose(start)
        wanted = change.norm()
        if wanted <= SMALL * weight.norm():
            return 1.0
        most = torch.maximum(OF_WEIGHT * weight.norm(), OF_UPDATE * wanted)

        def fits(length: float) -> bool:
            moved = plan.compose({n: v + length * step[n] for n, v in start.items()}) - weight
            along = (moved / wanted * (change / wanted)).sum()
            return bool(0 <= along <= OVERSHOOT) and bool(moved.norm() <= most)

        low = 1.0
        for _ in range(HALVINGS):
            if fits(low):
                break
            low /= 2
        if low == 1:
            return low
        high = 2 * low
        for _ in range(REFINEMENTS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def scale_for(kept: float) -> float:
    """Return the multiplier of a projected update: 1 / kept share, at most 50."""
    return min(LARGEST_SCALE, 1 / max(kept, SMALLEST_SHARE))


def _working_dtype(*values: Tensor) -> torch.dtype:
    """Return float64 if any value has it, else float32; half precision has too few digits."""
    wide = torch.float64 in {value.dtype for value in values}
    return torch.float64 if wide else torch.float32
