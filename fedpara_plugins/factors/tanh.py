"""Operands under tanh: the size that gives a variance, and how far a step moves them.

An operand is a sum over the rank and close to normal. With z ~ N(0, a²) and S shared operands,

    Var(W) = b² E[tanh²(z)]^S
    K = S b² E[tanh²(z)]^(S-1) E[tanh'(z)²] a² p / σ²

where p factors of standard deviation σ make an operand and b is the bound. For small a both
formulas become those without tanh. (Derived for this project; the paper gives neither.)
"""

from __future__ import annotations

from math import sqrt

import numpy as np

__all__ = ["tanh_bound", "tanh_speed", "tanh_spread"]

STANDARD_DEVIATIONS = 4
"""Standard deviations of the weight that the bound covers at least."""

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(96)


def tanh_bound(variance: float) -> float:
    """Return b: 1 as in the paper, or more where entries would not fit between -1 and 1."""
    return max(1.0, STANDARD_DEVIATIONS * sqrt(variance))


def tanh_spread(variance: float, operands: int) -> float:
    """Return a, the standard deviation before tanh that gives W this variance."""
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
    """Return the speed K relative to that of factors of the same size without tanh."""
    square = _mean(np.tanh(spread * _NODES) ** 2)
    slope = _mean(np.cosh(spread * _NODES) ** -4.0)
    return slope * (square / spread**2) ** (operands - 1)


def _mean(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Return the expectation over a standard normal variable of values at the nodes."""
    return float((values * _WEIGHTS).sum() / _WEIGHTS.sum())
