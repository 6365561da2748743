"""A linear layer's output and gradients by the native library, without the whole weight.

The library composes a block of the weight and multiplies it with the inputs while the block is in
the cache. It computes the weight's gradient a tile at a time, and at once from each tile the
gradients of the factors. For few inputs this takes less time than torch's matrix products, which
read and write the whole weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedpara_plugins.factors.fast import native
from fedpara_plugins.factors.fast.conditions import differentiates
from fedpara_plugins.factors.fast.form import Form
from fedpara_plugins.factors.fast.weight import Plain, differentiable_gradients

__all__ = ["linear_fused"]


def linear_fused(
    form: Form,
    inputs: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    *,
    plain: Plain,
) -> Tensor:
    """Compute x Wᵀ + b, shape (..., m).

    Args:
        form: how the operands make the weight.
        inputs: x, shape (..., n).
        factors: of a matrix; `fedpara_plugins.factors.fast.native.serves` must accept them.
        bias: b, shape (m,), or None.
        plain: the same by torch's own operations, from x, b and the factors.
    """
    output: Tensor = _Fused.apply(form, plain, inputs, bias, *factors)  # type: ignore[no-untyped-call]
    return output


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        form: Form,
        plain: Plain,
        inputs: Tensor,
        bias: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.form, ctx.plain = form, plain
        ctx.save_for_backward(inputs, bias, *factors)
        return native.linear(form, factors, inputs, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors  # read once: a checkpoint does not return them again
        needed = ctx.needs_input_grad[2:]
        if differentiates(gradient):
            return None, None, *differentiable_gradients(ctx.plain, given, gradient, needed)
        inputs, _, *factors = given
        for_inputs, for_bias, *for_factors = needed
        d_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if for_bias else None
        if True in for_factors:
            d_inputs, *found = native.linear_gradients(
                ctx.form, factors, inputs, gradient, [for_inputs, *for_factors]
            )
            return None, None, d_inputs, d_bias, *found
        d_inputs = None
        if for_inputs:
            factors = [factor.contiguous() for factor in factors]
            d_inputs = gradient @ native.compose(ctx.form, factors)
        return None, None, d_inputs, d_bias, *[None] * len(factors)
