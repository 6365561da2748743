"""Does a weight look as it was drawn, or trained? Converting would silently lose the latter.

Entries that were drawn independently keep the largest singular value of a matrix at its edge,
std (sqrt m + sqrt n), with fluctuations of known size (Johnstone 2001, Ann. Statist. 29:295; for
entries of any distribution by universality). Orthogonal weights stay below it. Training adds
directions that stand out. Which initialiser drew a weight, and of what variance, does not matter.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

__all__ = ["looks_trained", "norm_has_moved"]

LANCZOS_STEPS = 25
ABOVE_EDGE = 4.0
"""In units of the fluctuation, whose own mean is -1.2 and standard deviation 1.3."""

LARGEST_MEAN = 2.5
"""In standard deviations; that of uniform values between 0 and 1 is 1.7, all others' is 0."""


def looks_trained(weight: Tensor) -> bool:
    """A guess, made to be silent about fresh weights and right about those trained for long.

    Rows and columns are brought to one size first, since some initialisers draw gates, heads or
    rows with different variances.

    Args:
        weight: at least two-dimensional; kernels count as (O, I k1 ...).
    """
    rows = weight.detach().flatten(1).float().cpu()
    mean = float(rows.mean())
    rows = rows - mean
    std = float(rows.square().mean().sqrt())
    if std <= 1e-6 * abs(mean):
        return False  # a constant, drawn by nobody and trained by nobody
    if abs(mean) > LARGEST_MEAN * std:
        return True
    for side in (1, 0):
        size = rows.square().mean(side, keepdim=True).sqrt()
        rows = rows / torch.where(size > 0, size, 1.0)
    root_m, root_n = sqrt(rows.shape[0]), sqrt(rows.shape[1])
    square = float(rows.square().mean())
    edge = (root_m + root_n) ** 2
    fluctuation = (root_m + root_n) * (1 / root_m + 1 / root_n) ** (1 / 3)
    return bool(_largest_eigenvalue(rows) / square > edge + ABOVE_EDGE * fluctuation)


def norm_has_moved(layer: nn.Module) -> bool:
    """Whether a normalisation layer's weights differ among each other, and so do its biases.

    All that start it at constants are recognised; some recipes draw the weights, never both.
    """
    if "Norm" not in type(layer).__name__:
        return False
    own = [p for p in layer._parameters.values() if p is not None and p.numel() > 1]
    return bool(own) and all(p.dim() == 1 and bool((p != p[0]).any()) for p in own)


def _largest_eigenvalue(rows: Tensor) -> float:
    """Of rowsᵀ rows, from below, by Lanczos' method from a fixed start."""
    generator = torch.Generator("cpu").manual_seed(0)
    vector = torch.randn(rows.shape[1], generator=generator, dtype=rows.dtype, device="cpu")
    vector = vector / vector.norm()
    before, beta = torch.zeros_like(vector), 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(LANCZOS_STEPS, *rows.shape)):
        image = rows.T @ (rows @ vector) - beta * before
        diagonal.append(float(image @ vector))
        image = image - diagonal[-1] * vector
        beta = float(image.norm())
        if beta <= 1e-6 * diagonal[0]:
            break
        beside.append(beta)
        before, vector = vector, image / beta
    size = len(diagonal)
    both = torch.diag(torch.tensor(diagonal, dtype=rows.dtype, device="cpu"))
    both[range(size - 1), range(1, size)] = torch.tensor(
        beside[: size - 1], dtype=rows.dtype, device="cpu"
    )
    return float(torch.linalg.eigvalsh(both, UPLO="U")[-1])
