"""Pure functions from factors to a weight.

Shapes: X (m, R), Y (n, R), T (R, R, k1, ...); the result is (m, n) or (m, n, k1, ...).
No parameters, no state: what a layer, an export, a projection and a test all call. With torch's own
operations only; what a training step runs is in `factors.fast`, with the same results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["combine_fedpara", "combine_lowrank", "combine_pfedpara", "core_product", "operand"]


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
    outer = x @ core_product(y, t)  # (m, n*k1*...)
    return outer.view(x.shape[0], y.shape[0], *t.shape[2:])


def core_product(y: Tensor, t: Tensor) -> Tensor:
    """The core's second side multiplied with Y: shape (R, n*k1*...)."""
    rank, n = t.shape[0], y.shape[0]
    # One large product and a copy of its small result: a batch of R products with only k1*...
    # columns each takes five times as long on a CPU.
    core = t.flatten(2).transpose(0, 1).reshape(t.shape[1], -1)  # (R, R*k1*...)
    return (y @ core).view(n, rank, -1).transpose(0, 1).reshape(rank, -1)


def combine_lowrank(operands: Sequence[Tensor]) -> Tensor:
    """W = W1: the conventional low-rank (matrix) or Tucker (kernel) weight."""
    return operands[0]


def combine_fedpara(operands: Sequence[Tensor]) -> Tensor:
    """W = W1 * W2, elementwise (paper, section 2)."""
    return operands[0] * operands[1]


def combine_pfedpara(operands: Sequence[Tensor]) -> Tensor:
    """W = W1 * (W2 + 1), elementwise, W1 shared and W2 private (paper, section 2.3)."""
    return torch.addcmul(operands[0], operands[0], operands[1])
