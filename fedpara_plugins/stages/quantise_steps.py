"""Which step each group of values gets: the encoder's half of stage ``quantise``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedpara_plugins.errors import PayloadError

__all__ = ["Rows", "Step", "StepRule", "arithmetic", "grouped"]

_SQUARES = (1e-12, 1e12)
"""Peaks of which neither the squares nor their sums leave the range of float32."""


Rows = NDArray[np.floating]
"""Values as (groups, values of a group). numpy takes half of torch's time to start an operation,
which is most of what small tensors cost."""


class Step(NamedTuple):
    """A step, exact in `arithmetic`'s type, and the largest symbol that goes with it."""

    size: float
    most: int


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The type in which tensors of this dtype are divided and multiplied."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grouped(values: Rows, scope: str, block: int) -> Rows:
    """Values of any shape as (groups, values of a group); zeros fill up the last block."""
    if scope == "r":
        return values.reshape(len(values), -1)
    flat = values.reshape(-1)
    if scope == "b":
        return np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    return flat.reshape(1, -1)


class StepRule(NamedTuple):
    """How a step follows from the values that share it; exactly one of the two is not None."""

    bits: int | None
    rms: float | None

    def steps(self, name: str, rows: Rows, tensor: torch.Tensor) -> list[Step]:
        """The step of each row.

        Args:
            name: of the tensor, for messages.
            rows: (groups, values of a group), possibly filled up with zeros.
            tensor: as it was sent.

        Raises:
            PayloadError: NaN or infinity among the values.
        """
        least, top = float(np.finfo(rows.dtype).tiny), torch.finfo(tensor.dtype).max
        lower = float if rows.dtype == np.float64 else _float32_below
        peaks = _peaks(name, rows, tensor)
        if self.rms is None:
            half = 2 ** ((self.bits or 0) - 1) - 1
            return [Step(max(_divided(peak, half, lower), least), half) for peak in peaks]
        roots = _roots(rows, peaks, tensor.numel())
        wanted = (min(self.rms * root, peak) for root, peak in zip(roots, peaks, strict=True))
        pairs = zip(wanted, peaks, strict=True)
        return [_fitted(max(lower(size), least), peak, lower, top) for size, peak in pairs]


def _fitted(size: float, peak: float, lower: Callable[[float], float], top: float) -> Step:
    """The step, or a smaller one where rounding up would leave the dtype."""
    most = math.ceil(peak / size)
    # Then the step divides the peak, and no symbol stands for more than that.
    return Step(size if most * size <= top else _divided(peak, most, lower), most)


def _divided(peak: float, parts: int, lower: Callable[[float], float]) -> float:
    """A step of which so many do not exceed the peak, as floats multiply."""
    size = lower(peak / parts)
    # Only float64 steps can be above the quotient: no wider type was there to divide in.
    return size if parts * size <= peak else math.nextafter(size, 0.0)


def _float32_below(value: float) -> float:
    """The largest float32 that is not above a value of at least 0."""
    near = np.float32(value)
    # As Python floats: numpy 2 would compare in float32, where both are equal.
    return float(near if float(near) <= value else np.nextafter(near, np.float32(0)))


def _peaks(name: str, rows: Rows, tensor: torch.Tensor) -> list[float]:
    """Largest magnitude of each row."""
    if rows.size == 0:
        return [0.0] * len(rows)
    # No temporary; NaN and infinity both show in the result.
    low, high = rows.min(axis=1).tolist(), rows.max(axis=1).tolist()
    if not all(map(math.isfinite, low + high)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise PayloadError(
            f"tensor {name!r}: {bad} of {tensor.numel()} values are NaN or infinite, which "
            "'quantise' cannot carry. Training has probably diverged: lower the learning rate or "
            "clip gradients; codec 'lossless' sends such values as they are"
        )
    return [max(-one, other) for one, other in zip(low, high, strict=True)]


def _roots(rows: Rows, peaks: list[float], count: int) -> Iterator[float]:
    """Root mean square of each row; ``count`` values are not filled up."""
    counts = [rows.shape[1]] * len(rows)
    counts[-1] = count - rows.shape[1] * (len(rows) - 1)
    if len(rows) == 1 and _SQUARES[0] < peaks[0] < _SQUARES[1]:
        sums, units = [float(np.dot(rows[0], rows[0]))], [1.0]
    else:
        # Squares of other values may leave the range; those of shares of the peak do not.
        units = [peak or 1.0 for peak in peaks]
        shares = rows / np.array(units)[:, None]
        sums = np.einsum("ij,ij->i", shares, shares).tolist()
    return (
        unit * math.sqrt(total / max(number, 1))
        for unit, total, number in zip(units, sums, counts, strict=True)
    )
