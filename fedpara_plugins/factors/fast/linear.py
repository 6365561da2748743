"""Which way a linear layer takes from factors and inputs to its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fedpara_plugins.factors.fast import native
from fedpara_plugins.factors.fast.conditions import as_autocast_casts, may_run
from fedpara_plugins.factors.fast.form import Form
from fedpara_plugins.factors.fast.linear_blocks import linear_by_blocks
from fedpara_plugins.factors.fast.linear_factors import linear_by_factors
from fedpara_plugins.factors.fast.linear_fused import linear_fused

__all__ = ["linear_from_factors"]

FACTORS_COST = 1.25
"""Measured time of `linear_by_factors` per multiplication, that of composing by torch = 1."""

FACTORS_COST_NATIVE = 1.6
"""The same next to `linear_fused`,"""

FACTORS_START_NATIVE = 40_000_000
"""and how many multiplications the latter does while the former, in many small steps, starts."""

BLOCKS_BYTES = 32 << 20
"""From this size on torch composes the blocks of a weight twice, forward and backward, in less time
than its passes through memory over the whole take. The kernels make no such passes."""


FUSED_INPUTS = 256
"""Up to so many inputs the kernels multiply a weight that never exists as a whole; torch's products
with more of them are fast enough to pay for one that does."""


class PlannedMatrix(Protocol):
    """What a `WeightPlan` of a matrix (m, n) is here."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n)."""

    @property
    def rank(self) -> int:
        """R of every operand."""

    @property
    def form(self) -> Form | None:
        """How the operands make the weight; None if no function here computes it."""

    @property
    def recompute(self) -> bool | None:
        """Whether backward computes products again; None lets their size decide."""

    def ordered(self, factors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return x1, y1, x2, y2 as far as there are any."""

    def compose_plainly(self, ordered: Sequence[Tensor]) -> Tensor:
        """Return W (m, n), composed by torch's own operations."""


def linear_from_factors(
    plan: PlannedMatrix, factors: Mapping[str, Tensor], inputs: Tensor, bias: Tensor | None
) -> Tensor | None:
    """Give x Wᵀ + b, shape (..., m); None where W is to be composed as for any other layer.

    Args:
        plan: of a matrix (m, n).
        factors: by name.
        inputs: x, shape (..., n).
        bias: b, shape (m,), or None.
    """
    form = plan.form
    if form is None or not _fits(plan, inputs) or _frozen(factors, inputs, bias):
        return None
    if form.operands == 1 and not form.tanh:
        x = factors["x1"] * form.gains[0]
        return _plus(functional.linear(functional.linear(inputs, factors["y1"].T), x), bias)
    count = inputs.numel() // plan.shape[1]
    given = [inputs, *plan.ordered(factors)]
    if not may_run([*given, bias]):
        return None
    kernels = native.serves(form, given[1:]) and not torch.is_autocast_enabled("cpu")
    by_factors = not form.tanh and _few(plan, count, kernels)
    fused = kernels and not by_factors and 0 < count <= FUSED_INPUTS
    if fused and _as_planned(plan, factors, bias):
        return linear_fused(form, inputs, given[1:], bias, plain=partial(_plainly_with_bias, plan))
    if by_factors or _by_blocks(plan, kernels):
        first, *rest = as_autocast_casts(given)
        rows = first.reshape(-1, plan.shape[1])
        way = linear_by_factors if by_factors else linear_by_blocks
        output = way(form, rows, rest, plain=partial(_plainly, plan, None))
        return _plus(output.view(*inputs.shape[:-1], plan.shape[0]), bias)
    return None


def _fits(plan: PlannedMatrix, inputs: Tensor) -> bool:
    """Whether they are rows of as many features as the layer has; torch says what is wrong."""
    if inputs.is_nested or inputs.layout is not torch.strided or not inputs.dim():
        return False
    return inputs.shape[-1] == plan.shape[1]


def _frozen(factors: Mapping[str, Tensor], inputs: Tensor, bias: Tensor | None) -> bool:
    """Whether gradients pass a layer that learns nothing: a dense one does not keep its inputs."""
    if not torch.is_grad_enabled() or any(f.requires_grad for f in factors.values()):
        return False
    return inputs.requires_grad or (bias is not None and bias.requires_grad)


def _as_planned(plan: PlannedMatrix, factors: Mapping[str, Tensor], bias: Tensor | None) -> bool:
    """Whether they have the planned shapes; torch broadcasts others, or says what is wrong."""
    m, n = factors["x1"].shape[0], factors["y1"].shape[0]
    return (m, n) == plan.shape and (bias is None or bias.shape == (m,))


def _plainly(plan: PlannedMatrix, bias: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    inputs, *factors = tensors
    return functional.linear(inputs, plan.compose_plainly(factors), bias)


def _plainly_with_bias(plan: PlannedMatrix, tensors: Sequence[Any]) -> Tensor:
    inputs, bias, *factors = tensors
    return _plainly(plan, bias, [inputs, *factors])


def _plus(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output + bias.to(output.dtype)


def _by_blocks(plan: PlannedMatrix, kernels: bool) -> bool:
    """Whether the weight is never to exist as a whole: by its size in float32, or as asked for."""
    large = 4 * plan.shape[0] * plan.shape[1] >= BLOCKS_BYTES
    if kernels:
        return large and plan.recompute is True
    return large if plan.recompute is None else plan.recompute


def _few(plan: PlannedMatrix, inputs: int, kernels: bool) -> bool:
    """Whether inputs are so few that products with factors cost less than composing."""
    (m, n), rank = plan.shape[:2], plan.rank
    cost, start = (FACTORS_COST_NATIVE, FACTORS_START_NATIVE) if kernels else (FACTORS_COST, 0)
    by_factors = start + cost * 2 * inputs * rank * rank * (4 * m + 3 * n)
    composed = 6 * inputs * m * n + 12 * m * n * rank
    return inputs > 0 and by_factors < composed
