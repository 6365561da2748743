"""The new factors of a weight that was trained as an ordinary dense one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedpara_plugins.plan import WeightPlan
from fedpara_plugins.projection.least_squares import ITERATIONS, solve
from fedpara_plugins.projection.tangent import Factors, Tangent

__all__ = ["Projected", "project", "scale_for"]

LARGEST_SCALE = 50.0
SMALLEST_SHARE = 1e-3


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
    moved.

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
    scale = scale_for(kept) * largest
    moved = {
        name: (value.to(wide) + scale * moves[name]).to(value.dtype)
        for name, value in factors.items()
    }
    return Projected(moved, kept)


def scale_for(kept: float) -> float:
    """What a projected update is multiplied with: 1 / kept share, at most 50."""
    return min(LARGEST_SCALE, 1 / max(kept, SMALLEST_SHARE))


def _working_dtype(*values: Tensor) -> torch.dtype:
    """float64 if anything is, else float32: half precision has too few digits to solve in."""
    wide = torch.float64 in {value.dtype for value in values}
    return torch.float64 if wide else torch.float32
