"""The scale of an axis: positions of values, and ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["AxisScale", "byte_unit", "tick_label"]

_TINY = 1e-100
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


@dataclass(frozen=True)
class AxisScale:
    """A linear or logarithmic map from values to positions from 0 to 1.

    Attributes:
        low: value at position 0.
        high: value at position 1.
        log: whether it is logarithmic; both ends are then positive.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def linear(cls, values: Iterable[float], *, zero: bool = False, most: int = 6) -> AxisScale:
        """Return a linear scale with round ends that contains the values.

        Args:
            values: may be empty.
            zero: whether the axis includes 0.
            most: most ticks.
        """
        found = list(values) or [0.0, 1.0]
        low, high = min(found), max(found)
        if zero:
            low = min(0.0, low)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):  # one value, but for rounding
            # A tiny value counts as 0: quotients by it would leave the range of a float.
            around = abs(high) if abs(high) > _TINY else 1.0
            low, high = (low if zero else low - around), high + around
        step = _step((high - low) / most)
        return cls(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)

    @classmethod
    def logarithmic(cls, values: Iterable[float]) -> AxisScale:
        """Return a logarithmic scale that contains the values: at least one, all positive."""
        found = list(values)
        low, high = min(found), max(found)
        return cls(low / 1.25, high * 1.25, log=True)

    def position(self, value: float) -> float:
        """Return the position, from 0 to 1, of a value between the ends."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6, *, whole: bool = False) -> list[float]:
        """Return round values between the ends.

        Args:
            most: about how many of them.
            whole: whether only whole numbers are allowed.
        """
        if self.log:
            return self._log_ticks(most)
        step = _step((self.high - self.low) / most)
        if whole:
            step = max(1.0, step)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            ticks = [f * 10.0**e for e in exponents for f in factors]
            ticks = [t for t in ticks if self.low <= t <= self.high]
            if len(ticks) <= most:
                return ticks
        return ticks[:: math.ceil(len(ticks) / most)]


def _step(width: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is at least ``width``."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= width * (1 - 1e-9))


def byte_unit(largest: float) -> tuple[str, float]:
    """Return the unit in which to show up to ``largest`` bytes, and its size in bytes."""
    return next(((u, size) for u, size in _UNITS if largest >= size), _UNITS[-1])


def tick_label(value: float) -> str:
    """Return the label of a tick."""
    if value and (abs(value) >= 1e7 or abs(value) < 1e-4):
        return f"{value:g}"
    return f"{value:,.4f}".rstrip("0").rstrip(".")
