"""Least squares: the movement of factors that comes closest to a wanted movement of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedpara_plugins.factors.projection.tangent import Factors, Tangent

__all__ = ["ITERATIONS", "Solution", "solve"]

ITERATIONS = 5
"""Thirty iterations keep more of a layer's update (`benchmarks/dense_local.py` says how much), but
take six times as long, and the rescaling makes up for most of the difference."""


class Solution(NamedTuple):
    """The result of `solve`.

    Attributes:
        moves: d, by factor.
        kept: <J d, V> / |V|², the share of the wanted movement that d achieves, from 0 to 1.
    """

    moves: Factors
    kept: float


def solve(tangent: Tangent, wanted: Tensor, *, iterations: int = ITERATIONS) -> Solution:
    """Minimise |J d - V|² by preconditioned conjugate gradients (CGLS), starting at d = 0.

    The iterations never contain movements that change nothing (a rotation between X and Y), so no
    damping is needed: the solution is the one that is smallest in the preconditioner's norm.

    Args:
        tangent: J.
        wanted: V, shape (m, n k1 ...), not zero; of a size near 1, since it is squared.
        iterations: the largest number of iterations; fewer are made if nothing is left to gain.
    """
    invert = tangent.preconditioner()
    missing = wanted.clone()  # V - J d
    gradient = tangent.vjp(missing)
    moves = {name: torch.zeros_like(value) for name, value in gradient.items()}
    steepest = invert(gradient)
    direction = steepest
    size = first = _dot(gradient, steepest)
    floor = first * torch.finfo(wanted.dtype).eps ** 2
    for iteration in range(iterations):
        if not size > floor:
            break
        moved = tangent.jvp(direction)
        length = float(moved.square().sum())
        if not length > 0:
            break
        step = size / length
        for name, value in direction.items():
            moves[name].add_(value, alpha=step)
        missing.sub_(moved, alpha=step)
        if iteration + 1 == iterations:
            break
        gradient = tangent.vjp(missing)
        steepest = invert(gradient)
        size, before = _dot(gradient, steepest), size
        direction = {
            n: value.add(direction[n], alpha=size / before) for n, value in steepest.items()
        }
    kept = float(((wanted - missing) * wanted).sum() / wanted.square().sum())
    return Solution(moves, min(1.0, max(0.0, kept)))


def _dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return sum(float((value * other[name]).sum()) for name, value in one.items())
