"""A linear layer's output without its weight, from products of inputs and factors alone.

With W = (X1 Y1ᵀ) * (X2 Y2ᵀ) an output is

    y_o = sum_p X1_op sum_q X2_oq M_pq        M_pq = sum_i x_i Y1_ip Y2_iq

This takes 2 R² (m + n) multiplications and additions for each input, where a dense layer takes
2 m n: about twice as many at the smallest rank that can be full (R² = m), for any batch size B.
Composing first costs (1 + 2 R / B) times as much as a dense layer, so fewer inputs than about 2 R
are cheaper here. For the 1 in W1 * (W2 + 1), X2 and Y2 get one more column of ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedpara_plugins.factors.fast.conditions import differentiates
from fedpara_plugins.factors.fast.form import Form
from fedpara_plugins.factors.fast.weight import Plain, differentiable_gradients

__all__ = ["linear_by_factors"]

CHUNK_BYTES = 2 << 20
"""Size of one product of some inputs with a factor, (inputs, R, n)."""


def linear_by_factors(
    form: Form, inputs: Tensor, factors: Sequence[Tensor], *, plain: Plain
) -> Tensor:
    """Compute x Wᵀ, shape (B, m), for a weight of two operands without tanh.

    Args:
        form: how the operands make the weight.
        inputs: x, shape (B, n).
        factors: x1, y1, x2, y2.
        plain: the same by torch's own operations, from x and the factors.
    """
    output: Tensor = _ByFactors.apply(form, plain, inputs, *factors)  # type: ignore[no-untyped-call]
    return output


class _ByFactors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Form, plain: Plain, inputs: Tensor, *factors: Tensor) -> Tensor:
        x1, y1, x2, y2 = _columns(form, factors)
        rank, m, second = x1.shape[0], x1.shape[1], x2.shape[0]
        output = inputs.new_empty(inputs.shape[0], m)
        inner = inputs.new_empty(second, inputs.shape[0] * rank)  # M, (R2, B R)
        for rows, columns in _chunks(inputs, rank, m):
            z = _outer(inputs[rows], y1)
            torch.mm(y2, z.T, out=inner[:, columns])
            v = (inner[:, columns].T @ x2).view(-1, rank, m)
            output[rows] = v.mul_(x1).sum(1)
        ctx.form, ctx.plain = form, plain
        ctx.save_for_backward(inputs, *factors, inner)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *factors, inner = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if differentiates(gradient):
            found = differentiable_gradients(ctx.plain, (inputs, *factors), gradient, needed)
            return None, None, *found
        x1, y1, x2, y2 = own = _columns(ctx.form, factors)
        d_x1, d_y1, d_x2, d_y2 = (torch.zeros_like(factor) for factor in own)
        d_inputs = torch.empty_like(inputs)
        (rank, m), n = x1.shape, inputs.shape[1]
        for rows, columns in _chunks(inputs, rank, m):
            x, own_gradient = inputs[rows], gradient[rows]
            v = (inner[:, columns].T @ x2).view(-1, rank, m)
            d_x1 += v.mul_(own_gradient.unsqueeze(1)).sum(0)
            dv = _outer(own_gradient, x1)
            d_x2.addmm_(inner[:, columns], dv)
            d_inner = x2 @ dv.T
            d_y2.addmm_(d_inner, _outer(x, y1))
            dz = (d_inner.T @ y2).view(-1, rank, n)
            d_y1 += (dz * x.unsqueeze(1)).sum(0)
            d_inputs[rows] = dz.mul_(y1).sum(1)
        gain, second = ctx.form.gains[0], x2.shape[0] - ctx.form.plus_one
        d_factors = (d_x1.T * gain, d_y1.T, d_x2[:second].T, d_y2[:second].T)
        return None, None, d_inputs, *d_factors


def _columns(form: Form, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Transpose x1, y1, x2, y2 to (R, m or n), with the scalar and the 1 included."""
    x1, y1, x2, y2 = factors
    second = [_with_ones(factor) if form.plus_one else factor.T.contiguous() for factor in (x2, y2)]
    return (x1.T * form.gains[0]).contiguous(), y1.T.contiguous(), *second


def _with_ones(factor: Tensor) -> Tensor:
    return torch.cat([factor.T, factor.new_ones(1, factor.shape[0])])


def _outer(inputs: Tensor, factor: Tensor) -> Tensor:
    """Multiply every row of the inputs by every column of the factor, elementwise: (B R, n)."""
    return (inputs.unsqueeze(1) * factor).flatten(0, 1)


def _chunks(inputs: Tensor, rank: int, m: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of inputs to compute together, each with its slice of (B R)."""
    size = rank * max(m, inputs.shape[1]) * inputs.element_size()
    step = max(1, CHUNK_BYTES // size)
    for start in range(0, inputs.shape[0], step):
        stop = min(inputs.shape[0], start + step)
        yield slice(start, stop), slice(start * rank, stop * rank)
