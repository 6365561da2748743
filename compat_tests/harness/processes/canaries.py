"""Search of what left a device for the values of given tensors, raw and decoded.

Raw, in bytes of any kind: pairs of neighbouring values as float32 or float64, and runs of eight as
float16 or bfloat16, in both byte orders and at any offset. In decoded tensors: the values of a
tensor in any order or selection, and (for what a lossy codec has changed) a stretch of a tensor by
its correlation with the values, at any offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
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

CORRELATED, SPREADS = 0.9, 8
"""The correlation that tells a stretch of ``n`` values, and how many spreads of that of independent
values (1/sqrt(n)) it must be. Codecs of a few bits a value leave 0.95; a private correction of the
head and the head itself, which learn from the same gradients, come to 0.6."""


class Canaries:
    """Values that can be told from all others, and a search for them.

    Runs of equal values and zeros are left out: they say nothing.

    Args:
        values: tensors, for example of what a client keeps.
        known: tensors whose values are no secret, such as seeded first values.
        most: the number of places of each tensor that are searched for, evenly spread; a larger
            part of the tensor than one place in so many is found. None searches for all.
    """

    def __init__(
        self,
        values: Iterable[Tensor],
        *,
        known: Iterable[Tensor] = (),
        most: int | None = None,
    ) -> None:
        public = np.unique(np.concatenate([np.zeros(1, np.float32), *map(_floats, known)]))
        tensors = [_floats(value) for value in values]
        secret = [t[~np.isin(t, public)] for t in tensors]
        self._tensors = [t for t in secret if len(np.unique(t)) >= FEW]
        distinct = [np.unique(_spread(t, most)) for t in self._tensors]
        self._values = np.concatenate([np.empty(0, np.float32), *distinct])
        self._owners = np.repeat(np.arange(len(distinct)), [len(t) for t in distinct])
        self._limits = np.array([FEW + SHARE * len(t) for t in distinct])
        self._runs = [_Runs(t, public, most) for t in tensors]

    def __len__(self) -> int:
        """Return the number of pairs of float32, in one byte order, that are searched for."""
        return len(self._short.words) // 2

    @cached_property
    def _short(self) -> _Index:
        return _Index(np.concatenate([_NONE, *(run.short() for run in self._runs)]))

    @cached_property
    def _long(self) -> _Index:
        return _Index(np.concatenate([_NONE, *(run.long() for run in self._runs)]))

    def found_in(self, data: bytes) -> int:
        """Count what occurs raw in the bytes; neighbouring values in any width."""
        views = [_view(data, offset) for offset in range(8)]
        return self._short.count(views) + self._long.count([_joined(view) for view in views])

    def missing_from(self, data: bytes) -> int:
        """Count the pairs of float32, in this machine's byte order, that do not occur."""
        pairs = _Index(np.concatenate([_NONE, *(_words(run.pairs()) for run in self._runs)]))
        return len(pairs.words) - pairs.count([_view(data, offset) for offset in range(8)])

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

    def _shares(self, suspect: NDArray[np.float32]) -> bool:
        """Return whether more values occur than by chance, in any order."""
        owners = self._owners[np.isin(self._values, suspect)]
        counts = np.bincount(owners, minlength=len(self._limits))
        return bool((counts > self._limits).any())

    def _is_close(self, suspect: NDArray[np.float32]) -> bool:
        return any(_correlates(own, suspect) for own in self._tensors)


_NONE: Words = np.empty(0, np.uint64)


def _floats(value: Tensor) -> NDArray[np.float32]:
    if not value.is_floating_point():
        return np.empty(0, np.float32)
    found: NDArray[np.float32] = value.detach().to("cpu", torch.float32).numpy().ravel()
    return found[np.isfinite(found)]


class _Runs:
    """Runs of neighbouring values, as the words that they are in memory."""

    def __init__(
        self, values: NDArray[np.float32], public: NDArray[np.float32], most: int | None
    ) -> None:
        self._values = values
        self._secret = ~np.isin(values, public)
        self._most = most

    def pairs(self) -> NDArray[np.float32]:
        """Return runs of two values."""
        return self._windows(2)

    def short(self) -> Words:
        """Return runs of 8 bytes."""
        pairs = self.pairs()
        return np.concatenate([_words(pairs), _words(pairs.byteswap())])

    def long(self) -> Words:
        """Return runs of 16 bytes, each as one word."""
        eights = self._windows(8)
        with np.errstate(over="ignore"):
            forms: list[NDArray[Any]] = [
                self._windows(2).astype(np.float64),
                _varied(eights.astype(np.float16)),
                _varied(torch.from_numpy(eights).to(torch.bfloat16).view(torch.int16).numpy()),
            ]
        words = [_words(each).reshape(-1, 2) for form in forms for each in (form, form.byteswap())]
        return np.concatenate([row[:, 0] * MIX + row[:, 1] for row in words])

    def _windows(self, length: int) -> NDArray[np.float32]:
        """Return runs of secret values that are not all alike."""
        if len(self._values) < length:
            return np.empty((0, length), np.float32)
        whole = np.lib.stride_tricks.sliding_window_view(self._secret, length).all(axis=1)
        starts = _spread(np.flatnonzero(whole), self._most)
        runs = np.lib.stride_tricks.sliding_window_view(self._values, length)[starts]
        return np.ascontiguousarray(runs[(runs != runs[:, :1]).any(axis=1)])


def _spread(values: NDArray[Any], most: int | None) -> NDArray[Any]:
    """Return so many entries, evenly spread, or all."""
    if most is None or len(values) <= most:
        return values
    return values[np.linspace(0, len(values) - 1, most).astype(np.int64)]


def _varied(rows: NDArray[Any]) -> NDArray[Any]:
    """Return the rows that still have different values in half of their places."""
    ordered = np.sort(rows, axis=1)
    distinct = (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1) + 1
    return rows[2 * distinct >= rows.shape[1]]


def _words(rows: NDArray[Any]) -> Words:
    return np.ascontiguousarray(rows).view(np.uint64).ravel()


def _joined(words: Words) -> Words:
    """Return one word for each two neighbours."""
    return words[:-1] * MIX + words[1:]


def _view(data: bytes, offset: int) -> Words:
    return np.frombuffer(data, np.uint64, max(len(data) - offset, 0) // 8, offset if data else 0)


class _Index:
    """A set of words with a fast search."""

    def __init__(self, words: Words) -> None:
        self.words = np.unique(words)
        self._table = np.zeros(1 << TABLE, np.bool_)
        self._table[_hashed(self.words)] = True

    def count(self, views: Iterable[Words]) -> int:
        """Count the words of the set that occur."""
        hits = [view[self._table[_hashed(view)]] for view in views]
        return int(np.isin(self.words, np.concatenate(hits), assume_unique=False).sum())


def _hashed(words: Words) -> NDArray[np.int64]:
    return (words * MIX >> np.uint64(64 - TABLE)).astype(np.int64)


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
