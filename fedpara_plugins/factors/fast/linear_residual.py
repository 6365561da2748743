"""A linear layer's output from a frozen weight and an update that is never composed.

    y = x W0ᵀ + b + s (x Y) Xᵀ

Whatever the number of inputs, this costs less than composing W: a training step then needs no
gradient of the whole weight, which is a third of a dense layer's work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fedpara_plugins.factors.fast.conditions import rewritten

__all__ = ["linear_with_update", "update_products"]


class SummedPlan(Protocol):
    """The part of a `WeightPlan` that this module needs; its operands are added."""

    @property
    def outer(self) -> float:
        """Return the multiplier of the combined operands."""

    @property
    def gains(self) -> tuple[float, ...]:
        """Return the multiplier of each operand."""


def update_products(
    plan: SummedPlan, factors: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield X, with all multipliers in it, Y and the core (or None) of each operand.

    Args:
        plan: of a weight whose operands are added.
        factors: by name.
    """
    for i, gain in enumerate(plan.gains, start=1):
        x, multiplier = factors[f"x{i}"], gain * plan.outer
        yield (x if multiplier == 1 else x * multiplier), factors[f"y{i}"], factors.get(f"t{i}")


def linear_with_update(
    plan: SummedPlan,
    factors: Mapping[str, Tensor],
    base: Tensor,
    inputs: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Compute x (W0 + update)ᵀ + b without composing the update.

    Args:
        plan: of a matrix (m, n) whose operands are added.
        factors: by name.
        base: W0, shape (m, n).
        inputs: x, shape (..., n).
        bias: b, shape (m,), or None.

    Returns:
        The output, shape (..., m), in the dtype that the frozen layer alone would give.
    """
    output = functional.linear(inputs, base, bias)
    for x, y, _ in update_products(plan, factors):
        inner = functional.linear(inputs.to(y.dtype), y.T)  # (..., R)
        output = _plus_product(output, inner, x)
    return output


def _plus_product(output: Tensor, inner: Tensor, x: Tensor) -> Tensor:
    """Return output + inner Xᵀ, in place of the output where nothing else can see it."""
    if rewritten() or torch.is_autocast_enabled(output.device.type) or output.is_nested:
        return output + functional.linear(inner, x).to(output.dtype)
    if not output.is_contiguous() or x.dtype != output.dtype or type(output) is not Tensor:
        return output + functional.linear(inner, x).to(output.dtype)
    # One pass through memory: the product is added where it is made.
    output.view(-1, output.shape[-1]).addmm_(inner.reshape(-1, inner.shape[-1]), x.T)
    return output
