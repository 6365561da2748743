"""Pure functions from factors to a weight.

Shapes: X (m, R), Y (n, R), T (R, R, k1, ...); the result is (m, n) or (m, n, k1, ...).
Layers, exports, projections and tests all call these functions. They use torch's own operations
only; training steps run `factors.fast`, which gives the same results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "combine_fedpara",
    "combine_lowrank",
    "combine_pfedpara",
    "combine_sum",
    "core_product",
    "operand",
]


def operand(x: Tensor, y: Tensor, t: Tensor | None = None) -> Tensor:
    """Compose one inner weight: X Yᵀ for a matrix, T x1 X x2 Y for a kernel.

    Source: paper, Propositions 1 and 3.

    Args:
        x: X, shape (m, R).
        y: Y, shape (n, R).
        t: the core T of a kernel, shape (R, R, k1, ...), or None for a matrix.

    Returns:
        The inner weight, shape (m, n) or (m, n, k1, ...).
    """
    if t is None:
        return x @ y.T  # (m, n)
    outer = x @ core_product(y, t)  # (m, n*k1*...)
    return outer.view((x.shape[0], y.shape[0]) + t.shape[2:])  # noqa: RUF005  (a proxy has no `*`)


def core_product(y: Tensor, t: Tensor) -> Tensor:
    """Multiply the core's second side by Y; the result has shape (R, n*k1*...)."""
    rank, n = t.shape[0], y.shape[0]
    # One large product and a copy of its small result. On a CPU, a batch of R products with only
    # k1*... columns each takes five times as long.
    core = t.flatten(2).transpose(0, 1).reshape(t.shape[1], -1)  # (R, R*k1*...)
    return (y @ core).view(n, rank, -1).transpose(0, 1).reshape(rank, -1)


def combine_lowrank(operands: Sequence[Tensor]) -> Tensor:
    """Return W = W1: the conventional low-rank (matrix) or Tucker (kernel) weight."""
    return operands[0]


def combine_fedpara(operands: Sequence[Tensor]) -> Tensor:
    """Return W = W1 * W2, elementwise (paper, section 2)."""
    return operands[0] * operands[1]


def combine_pfedpara(operands: Sequence[Tensor]) -> Tensor:
    """Return W = W1 * (W2 + 1), elementwise; W1 is shared, W2 private (paper, section 2.3)."""
    return torch.addcmul(operands[0], operands[0], operands[1])


def combine_sum(operands: Sequence[Tensor]) -> Tensor:
    """Return W1 + W2: the update of pFedPara in the residual form, shared plus private."""
    return operands[0] + operands[1]
