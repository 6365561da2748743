"""A linear layer's output from factors, a block of the weight's rows at a time.

No tensor of the weight's size is ever made. Forward composes a block, uses it for the output, and
drops it while it is still in the cache; backward composes it once more for all its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedpara_plugins.factors.fast.conditions import differentiates
from fedpara_plugins.factors.fast.form import Form
from fedpara_plugins.factors.fast.operands import (
    FactorGradients,
    combine_into,
    operands_of,
    products,
    row_blocks,
)
from fedpara_plugins.factors.fast.weight import Plain, differentiable_gradients

__all__ = ["linear_by_blocks"]


def linear_by_blocks(
    form: Form, inputs: Tensor, factors: Sequence[Tensor], *, plain: Plain
) -> Tensor:
    """Compute x Wᵀ, shape (B, m).

    Args:
        form: how the operands make the weight.
        inputs: x, shape (B, n).
        factors: of a matrix, as for `fedpara_plugins.factors.fast.weight.compose`.
        plain: the same by torch's own operations, from x and the factors.
    """
    output: Tensor = _ByBlocks.apply(form, plain, inputs, *factors)  # type: ignore[no-untyped-call]
    return output


class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Form, plain: Plain, inputs: Tensor, *factors: Tensor) -> Tensor:
        operands = operands_of(form, factors)
        m, n = operands[0].x.shape[0], inputs.shape[1]
        output = inputs.new_empty(inputs.shape[0], m)
        for rows in row_blocks(m, n, inputs.element_size()):
            values = products(form, operands, rows)
            combine_into(values[0], form, values)
            output[:, rows] = inputs @ values[0].T
        ctx.form, ctx.plain = form, plain
        ctx.save_for_backward(inputs, *factors)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        form: Form = ctx.form
        inputs, *factors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if differentiates(gradient):
            found = differentiable_gradients(ctx.plain, (inputs, *factors), gradient, needed)
            return None, None, *found
        operands = operands_of(form, factors)
        gradients = FactorGradients(form, operands, needed[1:])
        d_inputs = torch.zeros_like(inputs) if needed[0] else None
        m, n = gradient.shape[1], inputs.shape[1]
        for rows in row_blocks(m, n, inputs.element_size()):
            values, own = products(form, operands, rows), gradient[:, rows]
            if any(needed[1:]):
                gradients.add(rows, own.T @ inputs, values)
            if d_inputs is not None:
                combine_into(values[0], form, values)
                d_inputs.addmm_(own, values[0])
        return None, None, d_inputs, *gradients.result()
