"""Handwritten digits as 32x32 colour images."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

__all__ = ["held_out", "training"]

HELD_OUT = 32


def training(client: int, clients: int) -> tuple[Tensor, Tensor]:
    """Return a client's images [n, 3, 32, 32] and labels."""
    images, labels = _all()
    return images[client : -2 * HELD_OUT : clients], labels[client : -2 * HELD_OUT : clients]


def held_out(client: int) -> tuple[Tensor, Tensor]:
    """Return images to evaluate on."""
    own = slice(-(client + 1) * HELD_OUT, -client * HELD_OUT or None)
    images, labels = _all()
    return images[own], labels[own]


def _all() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    small = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1  # [n, 1, 8, 8]
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear")
    return large.expand(-1, 3, -1, -1), torch.tensor(digits.target)[order]
