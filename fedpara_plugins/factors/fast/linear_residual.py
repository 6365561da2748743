"""A linear layer's output from a frozen weight and an update that is never composed.

    y = x W0ᵀ + b + s (x Y) Xᵀ

Whatever the number of inputs, this costs less than composing W: a training step then needs no
gradient of the whole weight, which is a third of a dense layer's work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from fedpara_plugins.factors.fast.conditions import autocasts, rewritten

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
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, float]]:
    """Yield X, Y, the core (or None) and the multiplier of each operand.

    Args:
        plan: of a weight whose operands are added.
        factors: by name.
    """
    for i, gain in enumerate(plan.gains, start=1):
        yield factors[f"x{i}"], factors[f"y{i}"], factors.get(f"t{i}"), gain * plan.outer


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
    plain = not (rewritten() or autocasts(output.device.type) or output.is_nested)
    for x, y, _, multiplier in update_products(plan, factors):
        if plain and x.dtype == y.dtype == output.dtype and output.is_contiguous():
            # The product is added where it is made, and gradients have the factors' layout.
            inner = inputs.reshape(-1, inputs.shape[-1]) @ y  # (inputs, R)
            output.view(-1, output.shape[-1]).addmm_(inner, x.T, alpha=multiplier)
        else:
            inner = functional.linear(inputs.to(y.dtype), y.T)  # (..., R)
            output = output + functional.linear(inner, x * multiplier).to(output.dtype)
    return output
