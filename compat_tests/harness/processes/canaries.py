"""Search of what left a device for the values of given tensors, raw and decoded.

Raw, in bytes of any kind: pairs of neighbouring values as float32 or float64, and runs of eight as
float16 or bfloat16, in both byte orders and at any offset. In decoded tensors: the values of a
tensor in any order or selection, and (for what a lossy codec has changed) a stretch of a tensor by
its correlation with the values, at any offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Canaries"]

Words = NDArray[np.uint64]

TABLE = 20
"""Bits of the hash that most words of a message are discarded by."""

MIX = np.uint64(0x9E3779B97F4A7C15)
"""Odd, with bits everywhere: the upper bits of a product depend on all bits of a word."""

SHARE, FEW = 0.02, 4
"""Values of a tensor that may occur in another one by chance: floats of one magnitude have some
24 random bits, so a message of 100,000 values holds 0.3 % of any others'."""

CORRELATED, SPREADS = 0.5, 8
"""The correlation that tells a stretch of ``n`` values, and how many spreads of that of independent
values (1/sqrt(n)) it must be: the chance of eight is 1e-15. A codec of 1.2 bits a value leaves 0.8
of an update."""


class Canaries:
    """Values that can be told from all others, and a search for them.

    Runs of equal values and zeros are left out: they say nothing.

    Args:
        values: tensors, for example of what a client keeps.
        known: tensors whose values are no secret, such as seeded first values.
    """

    def __init__(self, values: Iterable[Tensor], *, known: Iterable[Tensor] = ()) -> None:
        public = np.unique(np.concatenate([np.zeros(1, np.float32), *map(_floats, known)]))
        tensors = [_floats(value) for value in values]
        secret = [t[~np.isin(t, public)] for t in tensors]
        self._tensors = [t for t in secret if len(np.unique(t)) >= FEW]
        distinct = [np.unique(t) for t in self._tensors]
        self._values = np.concatenate([np.empty(0, np.float32), *distinct])
        self._owners = np.repeat(np.arange(len(distinct)), [len(t) for t in distinct])
        self._limits = np.array([FEW + SHARE * len(t) for t in distinct])
        runs = [_Runs(t, public) for t in tensors]
        self._short = _Index(np.concatenate([_NONE, *(run.short() for run in runs)]))
        self._long = _Index(np.concatenate([_NONE, *(run.long() for run in runs)]))

    def __len__(self) -> int:
        """Return the number of pairs of float32, in one byte order, that are searched for."""
        return len(self._short.words) // 2

    def found_in(self, data: bytes) -> int:
        """Count what occurs raw in the bytes; neighbouring values in any width."""
        views = [_view(data, offset) for offset in range(8)]
        return self._short.count(views) + self._long.count([_joined(view) for view in views])

    def found_among(self, tensors: Mapping[str, Tensor], *, close: bool = True) -> list[str]:
        """Return the names of tensors that hold values of the canaries.

        Args:
            tensors: as a receiver has decoded them.
            close: whether to find values that a codec has changed, too.
        """
        found = []
        for name, value in tensors.items():
            suspect = _floats(value)
            if self._shares(suspect) or (close and self._is_close(suspect)):
                found.append(name)
        return found

    def _correlates(values: NDArray[np.float32], suspect: NDArray[np.float32]) -> bool:
    """Return whether a stretch of the longer is near to the shorter, up to offset and scale."""
    short, long = sorted((values, suspect), key=len)
    n = len(short)
    limit = max(CORRELATED, SPREADS / max(n, 1) ** 0.5)
    if limit >= 1:
        return False
    short = short.astype(np.float64) - short.mean()
    long = long.astype(np.float64) - long.mean()
    size = 1 << (len(long) + n - 1).bit_length()
    products = np.fft.irfft(np.fft.rfft(long, size) * np.conj(np.fft.rfft(short, size)), size)
    sums, squares = (np.concatenate([[0], np.cumsum(each)]) for each in (long, long**2))
    mean = (sums[n:] - sums[:-n]) / n
    spread = np.maximum((squares[n:] - squares[:-n]) - n * mean**2, 0)
    norm = np.sqrt(spread * (short**2).sum())
    places = len(long) - n + 1
    return bool((np.abs(products[:places]) > limit * norm)[norm > 1e-12].any())
