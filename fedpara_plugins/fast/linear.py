"""Which way a linear layer takes from factors and inputs to its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from fedpara_plugins.fast import native
from fedpara_plugins.fast.conditions import as_autocast_casts, may_run
from fedpara_plugins.fast.linear_blocks import linear_by_blocks
from fedpara_plugins.fast.linear_factors import linear_by_factors

if TYPE_CHECKING:
    from fedpara_plugins.plan import WeightPlan

__all__ = ["linear_from_factors"]

FACTORS_COST = 1.25
"""Measured time of `linear_by_factors` per multiplication, that of composing by torch = 1."""

FACTORS_COST_NATIVE = 1.5
"""The same where fedpara-plugins-kernels composes."""

BLOCKS_BYTES = 32 << 20
"""From this size on torch composes the blocks of a weight twice, forward and backward, in less time
than its passes through memory over the whole take. The kernels make no such passes."""


def linear_from_factors(
    plan: WeightPlan, factors: Mapping[str, Tensor], inputs: Tensor
) -> Tensor | None:
    """Give x Wᵀ without W, shape (..., m); None where it is better, or necessary, to compose W.

    Args:
        plan: of a matrix (m, n).
        factors: by name.
        inputs: x, shape (..., n).
    """
    form = plan.form
    if form is None or inputs.shape[-1] != plan.shape[1]:
        return None
    if form.operands == 1 and not form.tanh:
        x = factors["x1"] * form.gains[0]
        return functional.linear(functional.linear(inputs, factors["y1"].T), x)
    ordered = [inputs, *plan.ordered(factors)]
    if not may_run(ordered):
        return None
    kernels = native.serves(form, ordered[1:]) and not torch.is_autocast_enabled("cpu")
    by_factors = not form.tanh and _few(plan, inputs.numel() // plan.shape[1], kernels)
    if not by_factors and not _by_blocks(plan, kernels):
        return None
    first, *rest = as_autocast_casts(ordered)
    assert first is not None
    way = linear_by_factors if by_factors else linear_by_blocks
    rows = first.reshape(-1, plan.shape[1])

    def plain(tensors: Sequence[Tensor | None]) -> Tensor:
        assert tensors[0] is not None
        return functional.linear(tensors[0], plan.compose_plainly(tensors[1:]))

    return way(form, rows, rest, plain=plain).view(*inputs.shape[:-1], plan.shape[0])


def _by_blocks(plan: WeightPlan, kernels: bool) -> bool:
    """Whether the weight is never to exist as a whole: by its size in float32, or as asked for."""
    if plan.recompute is None:
        return not kernels and 4 * plan.shape[0] * plan.shape[1] >= BLOCKS_BYTES
    return plan.recompute


def _few(plan: WeightPlan, inputs: int, kernels: bool) -> bool:
    """Whether inputs are so few that products with factors cost less than composing."""
    (m, n), rank = plan.shape[:2], plan.rank
    cost = FACTORS_COST_NATIVE if kernels else FACTORS_COST
    by_factors = cost * 2 * inputs * rank * rank * (4 * m + 3 * n)
    composed = 6 * inputs * m * n + 12 * m * n * rank
    return inputs > 0 and by_factors < composed
