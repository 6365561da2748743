"""Does a weight look as it was drawn, or trained? Converting would silently lose the latter."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

__all__ = ["looks_trained"]

POWER_STEPS = 30
ABOVE_EDGE = 1.15
"""Independent entries of any distribution keep the largest singular value near its edge
std (sqrt m + sqrt n); training adds directions that stand out of it."""


def looks_trained(weight: Tensor, variance: float) -> bool:
    """A guess, made to be right about weights that were trained for long.

    Args:
        weight: at least two-dimensional.
        variance: of the layer's default initialisation, which is uniform for most kinds.
    """
    rows = weight.detach().flatten(1).double().cpu()
    if rows.abs().max() <= sqrt(3 * variance) * 1.0001:
        return False
    std = rows.std(unbiased=False).item()
    edge = std * (sqrt(rows.shape[0]) + sqrt(rows.shape[1]))
    return _largest_singular_value(rows) > ABOVE_EDGE * edge


def _largest_singular_value(rows: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(rows.shape[1], generator=generator, dtype=rows.dtype)
    for _ in range(POWER_STEPS):
        vector = rows.T @ (rows @ vector)
        vector = vector / vector.norm().clamp_min(1e-300)
    return float((rows @ vector).norm())
