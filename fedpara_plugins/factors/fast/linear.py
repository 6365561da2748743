"""The choice of the fastest computation of a linear layer's output from factors and inputs."""

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
"""Measured time of `linear_by_factors` per multiplication, relative to composing by torch."""

FACTORS_COST_NATIVE = 1.6
"""Measured time of `linear_by_factors` per multiplication, relative to `linear_fused`."""

FACTORS_START_NATIVE = 40_000_000
"""Multiplications that `linear_fused` makes in the time that `linear_by_factors`, which makes many
small steps, takes to start."""

BLOCKS_BYTES = 32 << 20
"""Size of a weight from which on torch composes its blocks twice, in forward and backward, in less
time than its passes through memory take over the whole weight. The native library makes no such
passes."""

FUSED_INPUTS = 256
"""Largest number of inputs that the native library multiplies with a weight that never exists as a
whole. With more inputs torch's products are fast enough to compose the whole weight first."""


class PlannedMatrix(Protocol):
    """The part of a `WeightPlan` of a matrix (m, n) that this module needs."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (m, n)."""

    @property
    def rank(self) -> int:
        """Return the rank R of every operand."""

    @property
    def form(self) -> Form | None:
        """Return how operands make the weight; None if no hand-written function computes it."""

    @property
    def recompute(self) -> bool | None:
        """Return whether backward computes products again; None lets the size decide."""

    def ordered(self, factors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return those of x1, y1, x2, y2 that there are, in this order."""

    def compose_plainly(self, ordered: Sequence[Tensor]) -> Tensor:
        """Return W (m, n), composed by torch's own operations."""


def linear_from_factors(
    plan: PlannedMatrix, factors: Mapping[str, Tensor], inputs: Tensor, bias: Tensor | None
) -> Tensor | None:
    """Compute x Wᵀ + b, unless it is better to compose W as for any other layer.

    Args:
        plan: of a matrix (m, n).
        factors: by name.
        inputs: x, shape (..., n).
        bias: b, shape (m,), or None.

    Returns:
        The output, shape (..., m); None if the caller is to compose W.
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
    """Return whether the inputs are rows of n features; torch raises errors for others."""
    if inputs.is_nested or inputs.layout is not torch.strided or not inputs.dim():
        return False
    return inputs.shape[-1] == plan.shape[1]


def _frozen(factors: Mapping[str, Tensor], inputs: Tensor, bias: Tensor | None) -> bool:
    """Return whether gradients pass through a layer that is not trained.

    A dense layer then does not hold its inputs for backward, and neither may this one.
    """
    if not torch.is_grad_enabled() or any(f.requires_grad for f in factors.values()):
        return False
    return inputs.requires_grad or (bias is not None and bias.requires_grad)


def _as_planned(plan: PlannedMatrix, factors: Mapping[str, Tensor], bias: Tensor | None) -> bool:
    """Return whether factors and bias have the planned shapes; torch broadcasts, or raises."""
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
    """Return whether to compose by blocks, by the weight's size in float32 or ``recompute``."""
    large = 4 * plan.shape[0] * plan.shape[1] >= BLOCKS_BYTES
    if kernels:
        return large and plan.recompute is True
    return large if plan.recompute is None else plan.recompute


def _few(plan: PlannedMatrix, inputs: int, kernels: bool) -> bool:
    """Return whether inputs are so few that products with factors cost less than composing."""
    (m, n), rank = plan.shape[:2], plan.rank
    cost, start = (FACTORS_COST_NATIVE, FACTORS_START_NATIVE) if kernels else (FACTORS_COST, 0)
    by_factors = start + cost * 2 * inputs * rank * rank * (4 * m + 3 * n)
    composed = 6 * inputs * m * n + 12 * m * n * rank
    return inputs > 0 and by_factors < composed
