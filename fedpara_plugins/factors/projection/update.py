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
"""How far along V a weight may move, where training moved it by 1."""

OF_WEIGHT, OF_UPDATE = 0.75, 0.5
"""How far a weight may move in all: the larger of these shares of its own norm and of |V|.

Beside V itself a rescaled step holds what factors cannot keep apart from it, 1 / kept share as
large in the square, and what the Jacobian does not know, of second and higher order. Both do no
harm while they are small beside the weight. Measured with the three methods on digits, for |V| of
0.02 to 2 times |W| (`benchmarks/projection_length.py`): the step of least loss moved weights by 0.5
to 0.8 |W| where |V| was 0.5 to 0.9 |W|, and by about |V| / 2 where it was twice |W|; the whole step
then ended in losses of 8 to 960.
"""

SMALL = 1e-3
"""Of |W|: so short a V is followed as it is. Second order is nothing there, and the difference of
two composed weights can be mostly rounding."""

HALVINGS, REFINEMENTS = 60, 4
"""Of a step that goes too far, until it does not; and of the interval in which it began to."""


class Projected(NamedTuple):
    """What `project` returns."""

    factors: Factors
    """The new factors by name, in the dtypes and on the devices of the old ones."""

    kept: float | None
    """The share of the update that the projection kept before it was rescaled; None if the weight
    has not changed."""


@torch.no_grad()
def project(
    plan: WeightPlan,
    factors: Mapping[str, Tensor],
    before: Tensor,
    after: Tensor,
    *,
    iterations: int = ITERATIONS,
) -> Projected:
    """Move factors as a dense weight was moved, as far as factors can follow.

    One Gauss-Newton step: d minimises |J d - V|², V = after - before, J the Jacobian of the weight
    by all its factors, private ones included. Factors keep about the share of |V|² that they have
    of the dimensions, at every client alike: unscaled, the step would be that much too small. So d
    is multiplied with `scale_for` the kept share, which moves the weight along V as far as it was
    moved, to first order. Where the composed weight says that this is too far (after many steps, or
    large ones), the step is shortened: see `OVERSHOOT` and `OF_WEIGHT`.

    Args:
        plan: of the weight.
        factors: those that training started from.
        before: the weight that was given to the training, shape ``plan.shape``.
        after: what came back, finite.
        iterations: of conjugate gradients.

    Returns:
        The new factors; the old ones themselves where ``after`` equals ``before``.
    """
    wide = _working_dtype(*factors.values(), before, after)
    device = next(iter(factors.values())).device
    change = after.to(device, wide) - before.to(device, wide)
    largest = float(change.abs().max())
    if largest == 0:
        return Projected(dict(factors), None)
    # Of size 1 on the way: neither tiny nor huge changes leave the range when they are squared.
    wanted = (change / largest).flatten(1)
    tangent = Tangent(plan, {name: value.to(wide) for name, value in factors.items()})
    moves, kept = solve(tangent, wanted, iterations=iterations)
    step = {name: scale_for(kept) * largest * move for name, move in moves.items()}
    start = {name: value.to(wide) for name, value in factors.items()}
    length = _length(plan, start, step, change)
    moved = {
        name: (start[name] + length * step[name]).to(value.dtype) for name, value in factors.items()
    }
    return Projected(moved, kept)


def _length(plan: WeightPlan, start: Factors, step: Factors, change: Tensor) -> float:
    """The share of a step that does not go too far: 1 unless the composed weight says otherwise."""
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
    """What a projected update is multiplied with: 1 / kept share, at most 50."""
    return min(LARGEST_SCALE, 1 / max(kept, SMALLEST_SHARE))


def _working_dtype(*values: Tensor) -> torch.dtype:
    """float64 if anything is, else float32: half precision has too few digits to solve in."""
    wide = torch.float64 in {value.dtype for value in values}
    return torch.float64 if wide else torch.float32
