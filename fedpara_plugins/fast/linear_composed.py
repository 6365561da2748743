"""A linear layer's output from a composed weight whose gradient never exists as a whole.

With the kernels, the gradient by the weight is computed a tile at a time and taken back to the
factors at once. What torch would do instead, a matrix product, writing its result and reading it
again, takes longer for few inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedpara_plugins.fast import native
from fedpara_plugins.fast.form import Form
from fedpara_plugins.fast.weight import Plain, differentiable

__all__ = ["linear_composed"]


def linear_composed(
    form: Form,
    inputs: Tensor,
    factors: Sequence[Tensor | None],
    bias: Tensor | None,
    *,
    plain: Plain,
) -> Tensor:
    """Give x Wᵀ + b, shape (..., m).

    Args:
        form: how the operands make the weight.
        inputs: x, shape (..., n).
        factors: of a matrix, such that `fedpara_plugins.fast.native.serves` them.
        bias: b, shape (m,), or None.
        plain: from x, b and the factors the same with torch's own operations.
    """
    output: Tensor = _Composed.apply(form, plain, inputs, bias, *factors)  # type: ignore[no-untyped-call]
    return output


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        form: Form,
        plain: Plain,
        inputs: Tensor,
        bias: Tensor | None,
        *factors: Tensor | None,
    ) -> Tensor:
        weight = native.compose(form, factors)
        ctx.form, ctx.plain = form, plain
        kept = weight if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept, inputs, bias, *factors)
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *given = ctx.saved_tensors  # once: a checkpoint gives them no second time
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *differentiable(ctx.plain, given, gradient, needed)
        inputs, _, *factors = given
        d_inputs = gradient @ weight if needed[0] else None
        outputs = gradient.reshape(-1, gradient.shape[-1])
        d_bias = outputs.sum(0) if needed[1] else None
        found: list[Tensor | None] = [None] * len(factors)
        if any(needed[2:]):
            product = native.Product(outputs, inputs.reshape(len(outputs), -1))
            found = native.gradients(ctx.form, factors, product, needed[2:])
        return None, None, d_inputs, d_bias, *found
