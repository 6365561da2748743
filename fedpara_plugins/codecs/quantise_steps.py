"""Which step each group of values gets: the encoder's half of stage ``quantise``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from fedpara_plugins.errors import PayloadError

__all__ = ["Step", "StepRule", "arithmetic", "grouped"]

_SQUARES = (1e-12, 1e12)
"""Peaks of which neither the squares nor their sums leave the range of float32."""


class Step(NamedTuple):
    """A step, exact in `arithmetic`'s type, and the largest symbol that goes with it."""

    size: float
    most: int


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The type in which tensors of this dtype are divided and multiplied."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grouped(values: torch.Tensor, scope: str, block: int) -> torch.Tensor:
    """Values as (groups, values of a group); zeros fill up the last block."""
    if scope == "r":
        return values.reshape(values.shape[0], -1)
    flat = values.reshape(-1)
    if scope == "b":
        return torch.nn.functional.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    return flat.unsqueeze(0)


class StepRule(NamedTuple):
    """How a step follows from the values that share it; exactly one of the two is not None."""

    bits: int | None
    rms: float | None

    def steps(self, name: str, rows: torch.Tensor, tensor: torch.Tensor) -> list[Step]:
        """The step of each row.

        Args:
            name: of the tensor, for messages.
            rows: (groups, values of a group), possibly filled up with zeros.
            tensor: as it was sent.

        Raises:
            PayloadError: NaN or infinity among the values.
        """
        least, top = torch.finfo(rows.dtype).tiny, torch.finfo(tensor.dtype).max
        lower = float if rows.dtype == torch.float64 else _float32_below
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


def _peaks(name: str, rows: torch.Tensor, tensor: torch.Tensor) -> list[float]:
    """Largest magnitude of each row."""
    if rows.numel() == 0:
        return [0.0] * len(rows)
    # One pass and no temporary; NaN and infinity both show in the result.
    ends = torch.aminmax(rows) if len(rows) == 1 else torch.aminmax(rows, dim=1)
    low, high = (end.reshape(-1).tolist() for end in ends)
    peaks = [max(-one, other) for one, other in zip(low, high, strict=True)]
    if not all(map(math.isfinite, [*low, *high])):
        bad = int((~torch.isfinite(tensor)).sum())
        raise PayloadError(
            f"tensor {name!r}: {bad} of {tensor.numel()} values are NaN or infinite, which "
            "'quantise' cannot carry. Training has probably diverged: lower the learning rate or "
            "clip gradients; codec 'lossless' sends such values as they are"
        )
    return peaks


def _roots(rows: torch.Tensor, peaks: list[float], count: int) -> Iterator[float]:
    """Root mean square of each row; ``count`` values are not filled up."""
    counts = [rows.shape[1]] * len(rows)
    counts[-1] = count - rows.shape[1] * (len(rows) - 1)
    if len(rows) == 1 and _SQUARES[0] < peaks[0] < _SQUARES[1]:
        sums, units = [float(torch.dot(rows[0], rows[0]))], [1.0]
    else:
        # Squares of other values may leave the range; those of shares of the peak do not.
        units = [peak or 1.0 for peak in peaks]
        column = torch.tensor(units, dtype=torch.float64).unsqueeze(1)
        sums = (rows.double() / column).square().sum(dim=1).tolist()
    return (
        unit * math.sqrt(total / max(number, 1))
        for unit, total, number in zip(units, sums, counts, strict=True)
    )
