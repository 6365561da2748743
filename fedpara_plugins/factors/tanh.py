"""Operands under tanh: how large they must be for a variance, and how far a step moves them.

An operand is a sum over the rank and close to normal. With z ~ N(0, a²) and S shared operands,

    Var(W) = b² E[tanh²(z)]^S
    K = S b² E[tanh²(z)]^(S-1) E[tanh'(z)²] a² p / σ²

where p factors of standard deviation σ make an operand and b is the bound. For small a both are
what they are without tanh. (Derived for this project; the paper gives neither.)
"""

from __future__ import annotations

from math import sqrt

import numpy as np

__all__ = ["tanh_bound", "tanh_speed", "tanh_spread"]

STANDARD_DEVIATIONS = 4
"""The bound lies at least so many standard deviations out."""

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(96)


def tanh_bound(variance: float) -> float:
    """b: 1 as in the paper; more where entries of the variance would not fit between -1 and 1."""
    return max(1.0, STANDARD_DEVIATIONS * sqrt(variance))


def tanh_spread(variance: float, operands: int) -> float:
    """a: the standard deviation before tanh that gives W the variance."""
    wanted = (variance / tanh_bound(variance) ** 2) ** (1 / operands)
    low, high = 0.0, 4.0
    for _ in range(100):
        middle = (low + high) / 2
        if _mean(np.tanh(middle * _NODES) ** 2) < wanted:
            low = middle
        else:
            high = middle
    return high


def tanh_speed(spread: float, operands: int) -> float:
    """Share of the speed that factors of the same size would have without tanh."""
    square = _mean(np.tanh(spread * _NODES) ** 2)
    slope = _mean(np.cosh(spread * _NODES) ** -4.0)
    return slope * (square / spread**2) ** (operands - 1)


def _mean(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Expectation over a standard normal variable of what was computed at the nodes."""
    return float((values * _WEIGHTS).sum() / _WEIGHTS.sum())
