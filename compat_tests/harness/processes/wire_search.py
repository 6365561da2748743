"""Search bytes from a wire for the values of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["PIECE", "count_pieces", "pieces_of"]

PIECE = 8
"""Bytes that count as a find: two neighbouring float32. A message of 50 kB holds a given one by
chance with probability 3e-15."""


def pieces_of(values: Iterable[Tensor]) -> NDArray[np.uint64]:
    """Return all neighbouring pairs of floats as integers; constant pairs are left out."""
    found = []
    for value in values:
        floats = value.float().numpy().ravel()
        pairs = np.stack([floats[:-1], floats[1:]], axis=1)
        varied = pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs != 0).all(axis=1)]
        found.append(np.ascontiguousarray(varied).view(np.uint64).ravel())
    return np.unique(np.concatenate(found))


def count_pieces(pieces: NDArray[Any], data: bytes) -> int:
    """Count the pieces that occur in the bytes, at any offset."""
    found = []
    for offset in range(PIECE):
        window = data[offset:]
        window = window[: len(window) // PIECE * PIECE]
        found.append(np.frombuffer(window, dtype=np.uint64))
    return int(np.isin(pieces, np.concatenate(found)).sum())
