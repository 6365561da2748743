"""Pure functions from factors to a weight.

Shapes: X (m, R), Y (n, R), T (R, R, k1, ...); the result is (m, n) or (m, n, k1, ...).
No parameters, no state: what a layer, an export, a projection and a test all call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["combine_fedpara", "combine_lowrank", "combine_pfedpara", "operand"]


def operand(x: Tensor, y: Tensor, t: Tensor | None = None) -> Tensor:
    """One inner weight: X Yᵀ for a matrix, T x1 X x2 Y for a kernel (Propositions 1 and 3).

    Args:
        x: shape (m, R).
        y: shape (n, R).
        t: the core of a kernel, shape (R, R, k1, ...), or None for a matrix.

    Returns:
        shape (m, n), or (m, n, k1, ...).
    """
    if t is None:
        return x @ y.T  # (m, n)
    kernel = t.shape[2:]
    # Two plain matrix products; the equivalent einsum costs 1.5 times as much on a CPU.
    inner = torch.matmul(y, t.flatten(2))  # (R, n, k1*...)
    outer = x @ inner.flatten(1)  # (m, n*k1*...)
    return outer.view(x.shape[0], y.shape[0], *kernel)


def combine_lowrank(operands: Sequence[Tensor]) -> Tensor:
    """W = W1: the conventional low-rank (matrix) or Tucker (kernel) weight."""
    return operands[0]


def combine_fedpara(operands: Sequence[Tensor]) -> Tensor:
    """W = W1 * W2, elementwise (paper, section 2)."""
    return operands[0] * operands[1]


def combine_pfedpara(operands: Sequence[Tensor]) -> Tensor:
    """W = W1 * (W2 + 1), elementwise, W1 shared and W2 private (paper, section 2.3)."""
    return torch.addcmul(operands[0], operands[0], operands[1])
