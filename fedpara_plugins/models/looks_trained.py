"""A test for trained weights, which a conversion would otherwise silently drop.

If the entries of a matrix are drawn independently, its largest singular value lies near the edge
std (sqrt m + sqrt n), with fluctuations of known size (Johnstone 2001, Ann. Statist. 29:295; for
entries of any distribution by universality). Orthogonal weights lie below it. Training adds
directions beyond it. The initialiser and its variance do not matter.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from fedpara_plugins.support.torch_seams import own_parameters

__all__ = ["looks_trained", "norm_has_moved", "sign_of_training"]

LANCZOS_STEPS = 25
ABOVE_EDGE = 4.0
"""How far beyond the edge counts as trained, in fluctuations (mean -1.2, deviation 1.3)."""

LARGEST_MEAN = 2.5
"""The mean, in standard deviations, that counts as trained.

Uniform values between 0 and 1 have 1.7, all other initialisers 0.
"""


def looks_trained(weight: Tensor) -> bool:
    """Guess whether a weight is trained: never true of fresh ones, true after long training.

    Rows and columns are scaled to one size first, since some initialisers draw gates, heads or rows
    with different variances.

    Args:
        weight: at least two-dimensional; a kernel counts as (O, I k1 ...).
    """
    return bool(sign_of_training(weight))


def sign_of_training(weight: Tensor) -> str:
    """Return the sign by which a weight looks trained, a clause for an error; "" if none does.

    Args:
        weight: see `looks_trained`.
    """
    if weight.is_meta:
        return ""
    rows = weight.detach().flatten(1).float().cpu()
    mean = float(rows.mean())
    rows = rows - mean
    std = float(rows.square().mean().sqrt())
    if std <= 1e-6 * abs(mean):
        return ""  # a constant is neither drawn nor trained
    if abs(mean) > LARGEST_MEAN * std:
        return f"its mean is {abs(mean) / std:.1f} standard deviations from zero"
    for side in (1, 0):
        size = rows.square().mean(side, keepdim=True).sqrt()
        rows = rows / torch.where(size > 0, size, 1.0)
    root_m, root_n = sqrt(rows.shape[0]), sqrt(rows.shape[1])
    square = float(rows.square().mean())
    edge = (root_m + root_n) ** 2
    fluctuation = (root_m + root_n) * (1 / root_m + 1 / root_n) ** (1 / 3)
    largest = _largest_eigenvalue(rows) / square
    if not largest > edge + ABOVE_EDGE * fluctuation:
        return ""
    ratio = sqrt(largest / edge)
    return f"its largest singular value is {ratio:.2f} times that of independent draws"


def norm_has_moved(layer: nn.Module) -> bool:
    """Return whether the weights of a normalisation layer differ, and its biases too.

    Both start as constants. Some recipes draw the weights, none draws both.
    """
    if "Norm" not in type(layer).__name__:
        return False
    own = [p for p in own_parameters(layer).values() if p is not None and p.numel() > 1]
    if any(p.is_meta for p in own):
        return False
    return bool(own) and all(p.dim() == 1 and bool((p != p[0]).any()) for p in own)


def _largest_eigenvalue(rows: Tensor) -> float:
    """Return a lower bound of the largest eigenvalue of rowsᵀ rows, by Lanczos' method."""
    generator = torch.Generator("cpu").manual_seed(0)  # so that the answer is always the same
    vector = torch.randn(rows.shape[1], generator=generator, dtype=rows.dtype, device="cpu")
    vector = vector / vector.norm()
    before, beta = torch.zeros_like(vector), 0.0
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(min(LANCZOS_STEPS, *rows.shape)):
        image = rows.T @ (rows @ vector) - beta * before
        diagonal.append(float(image @ vector))
        image = image - diagonal[-1] * vector
        beta = float(image.norm())
        if beta <= 1e-6 * diagonal[0]:
            break
        off_diagonal.append(beta)
        before, vector = vector, image / beta
    size = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=rows.dtype, device="cpu"))
    tridiagonal[range(size - 1), range(1, size)] = torch.tensor(
        off_diagonal[: size - 1], dtype=rows.dtype, device="cpu"
    )
    return float(torch.linalg.eigvalsh(tridiagonal, UPLO="U")[-1])
