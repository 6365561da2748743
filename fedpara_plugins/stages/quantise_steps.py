"""The encoder's choice of a step for each group of values in stage ``quantise``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedpara_plugins.stages.checks import not_a_number

__all__ = ["PER_BLOCK", "PER_ROW", "PER_TENSOR", "QuantiserStep", "Rows", "StepRule", "group"]

PER_TENSOR, PER_ROW, PER_BLOCK = "t", "r", "b"
"""Letters of the scopes in the notes: one step for a tensor, for each row, for each block."""

_SAFE_TO_SQUARE = (1e-12, 1e12)
"""Peaks between these have squares, and sums of squares, within the range of float32."""

Rows = NDArray[np.floating]
"""Values of shape (groups, values of a group). They are numpy arrays because numpy starts an
operation in half of torch's time, which is most of the time that small tensors take."""


class QuantiserStep(NamedTuple):
    """A step size, exact in the type of the arithmetic, and the largest symbol that it leads to."""

    size: float
    largest_symbol: int


def group(values: Rows, scope: str, block: int) -> Rows:
    """Return values of any shape as (groups, values of a group); zeros pad the last block."""
    if scope == PER_ROW:
        return values.reshape(len(values), -1)
    flat = values.reshape(-1)
    if scope == PER_BLOCK:
        return np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    return flat.reshape(1, -1)


class StepRule(NamedTuple):
    """How a group's values determine its step; exactly one of ``bits`` and ``rms`` is not None."""

    bits: int | None
    rms: float | None

    def steps(self, name: str, rows: Rows, tensor: torch.Tensor) -> list[QuantiserStep] | None:
        """Return the step of each row; None if there are infinities, for which there is none.

        Args:
            name: the tensor's name, for messages.
            rows: (groups, values of a group), possibly padded with zeros.
            tensor: the values before grouping.

        Raises:
            PayloadError: NaN among the values.
        """
        least, top = float(np.finfo(rows.dtype).tiny), torch.finfo(tensor.dtype).max
        round_down = float if rows.dtype == np.float64 else _float32_at_most
        peaks = _peaks(name, rows, tensor)
        if math.inf in peaks:
            return None
        if self.rms is None:
            half = 2 ** ((self.bits or 0) - 1) - 1
            return [
                QuantiserStep(max(_divide(peak, half, round_down), least), half) for peak in peaks
            ]
        roots = _root_mean_squares(rows, peaks, tensor.numel())
        wanted = (min(self.rms * root, peak) for root, peak in zip(roots, peaks, strict=True))
        pairs = zip(wanted, peaks, strict=True)
        return [_fit(max(round_down(size), least), peak, round_down, top) for size, peak in pairs]


def _fit(
    size: float, peak: float, round_down: Callable[[float], float], top: float
) -> QuantiserStep:
    """Return the step, or a smaller one if rounding up the peak would overflow the dtype."""
    symbol = math.ceil(peak / size)
    # The smaller step divides the peak, so that no symbol stands for a larger value.
    return QuantiserStep(
        size if symbol * size <= top else _divide(peak, symbol, round_down), symbol
    )


def _divide(peak: float, count: int, round_down: Callable[[float], float]) -> float:
    """Return a step of which ``count``, multiplied as floats, do not exceed the peak."""
    size = round_down(peak / count)
    # Only a float64 step can exceed the quotient, since no wider type was there to divide in.
    return size if count * size <= peak else math.nextafter(size, 0.0)


def _float32_at_most(value: float) -> float:
    """Return the largest float32 that does not exceed a value of at least 0."""
    near = np.float32(value)
    # Compared as Python floats: numpy 2 would compare in float32, in which both are equal.
    return float(near if float(near) <= value else np.nextafter(near, np.float32(0)))


def _peaks(name: str, rows: Rows, tensor: torch.Tensor) -> list[float]:
    """Return the largest magnitude of each row, which may be infinite."""
    if rows.size == 0:
        return [0.0] * len(rows)
    # No copy; NaN and infinity both show in the result.
    low, high = rows.min(axis=1).tolist(), rows.max(axis=1).tolist()
    if any(map(math.isnan, low + high)):
        raise not_a_number(name, tensor, "which 'quantise' cannot carry")
    return [max(-one, other) for one, other in zip(low, high, strict=True)]


def _root_mean_squares(rows: Rows, peaks: list[float], count: int) -> Iterator[float]:
    """Yield the root mean square of each row; all but ``count`` values are padding."""
    counts = [rows.shape[1]] * len(rows)
    counts[-1] = count - rows.shape[1] * (len(rows) - 1)
    if len(rows) == 1 and _SAFE_TO_SQUARE[0] < peaks[0] < _SAFE_TO_SQUARE[1]:
        sums, units = [float(np.dot(rows[0], rows[0]))], [1.0]
    else:
        # Squares of other values may leave the range; squares of shares of the peak do not.
        units = [peak or 1.0 for peak in peaks]
        shares = rows / np.array(units)[:, None]
        sums = np.einsum("ij,ij->i", shares, shares).tolist()
    return (
        unit * math.sqrt(total / max(number, 1))
        for unit, total, number in zip(units, sums, counts, strict=True)
    )
