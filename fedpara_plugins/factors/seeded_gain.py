"""The rescaling of seeded factors to the variance of their plan.

Every side has to find the same number. It follows from the composed weight's variance in float64
and is rounded to `GAIN_BITS`. Composing takes most of the time of a draw, so it is done in float32
where that leads to the same number for certain, and not at all where one operand alone is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpara_plugins.factors.fast.form import is_known
from fedpara_plugins.factors.plan import WeightPlan

__all__ = [
    "BLOCK_ENTRIES",
    "GAIN_BITS",
    "TANH_PASSES",
    "DrawnFactors",
    "draw_bytes",
    "draw_nanoseconds",
    "rounded_gain",
]

Cast = Callable[[Tensor], Tensor]
"""Returns some values of a factor as they are computed with: `DrawnFactors.exact` or `near`."""

GAIN_BITS = 20
"""Bits to which the rescaling is rounded. The number of threads decides the order of summation; the
rounding removes its effect."""

BLOCK_ENTRIES = 2**18
"""Entries that are computed at a time, unless a single row has more."""
TILE = 1024
"""Columns of a weight that are computed at a time, unless the rank is large."""

TANH_PASSES = 8
"""Rescaling passes under tanh, where the variance is no exact power of the factors' size."""

SURE = 0.05
"""A number from float32 counts if it is farther than this from where the rounding changes, in units
of the last bit. Its error is some thousandths of that bit for `LARGE` entries and more."""
LARGE = 2**16
ORDINARY = (1e-16, 1e16)
"""Variances between these are computed without leaving float32's range on the way."""


@dataclass
class DrawnFactors:
    """Shared factors as they were drawn, and what they have been multiplied by since.

    The products are those of float64, one multiplication after the other, but only a few are held
    at a time.

    Attributes:
        drawn: float32, by name.
        gains: multipliers, in order.
    """

    drawn: dict[str, Tensor]
    gains: list[float] = field(default_factory=list)

    def exact(self, values: Tensor) -> Tensor:
        """Return some of the values of a factor as float64, multiplied."""
        found = values.double()
        for gain in self.gains:
            found.mul_(gain)
        return found

    def near(self, values: Tensor) -> Tensor:
        """Return some of the values of a factor as float32, multiplied at once."""
        gain = math.prod(self.gains)
        return values if gain == 1.0 else values * gain


def rounded_gain(plan: WeightPlan, factors: DrawnFactors) -> float:
    """Return what to multiply each shared factor by, rounded; 1 for a weight without variance.

    Args:
        plan: of the weight; its private operands are zero.
        factors: the shared ones.
    """
    power = 0.5 / len(factors.drawn)
    entries = math.prod(plan.shape)
    if _is_linear(plan):
        variance = _variance(entries, _linear_sums(plan, factors))
    else:
        if entries >= LARGE and _float32_is_float32():
            near = _variance(entries, _sums(plan, factors, factors.near))
            if ORDINARY[0] < near < ORDINARY[1]:
                scaled = (plan.variance / near) ** power * 2**GAIN_BITS
                if abs(scaled % 1.0 - 0.5) > SURE:
                    return float(round(scaled) / 2**GAIN_BITS)
        variance = _variance(entries, _sums(plan, factors, factors.exact))
    gain = (plan.variance / variance) ** power if variance > 0 else 1.0
    return float(round(gain * 2**GAIN_BITS) / 2**GAIN_BITS)


def _float32_is_float32() -> bool:
    """Return whether products of float32 are computed in it: a user may allow bfloat16."""
    return torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled(
        "cpu"
    )


def _variance(entries: int, sums: Sequence[float]) -> float:
    mean, square = (total / entries for total in sums)
    return square - mean * mean


def draw_nanoseconds(plan: WeightPlan) -> float:
    """Return about how long it takes one core to draw a weight's seeded factors.

    The constants are those of a cloud machine of 2023, rounded up; a weight of 4096 x 4096 at gamma
    0.3 takes 350 ms there, and 500 ms by this formula.
    """
    operands = len(_shared(plan))
    rows, columns = plan.shape[0], math.prod(plan.shape[1:])
    rank, entries = plan.rank, math.prod(plan.shape)
    core = rank * rank * columns if plan.kernel else 0
    total = 1e6 + 12.0 * plan.shared_parameters
    if _is_linear(plan):
        return total + 0.1 * ((rows + columns) * rank * rank + core)
    product = 0.03 * operands * (entries * rank + core)
    tanh = 10.0 * operands * entries if plan.tanh else 0.0
    once = product + tanh + 4.0 * entries
    if entries < LARGE:
        once *= 3.0  # in float64
    passes = TANH_PASSES if plan.tanh else 1
    if plan.tanh and plan.start < 1:
        passes += 3 * TANH_PASSES  # in float64 again
    return total + passes * once


def draw_bytes(plan: WeightPlan) -> int:
    """Return about how many bytes a draw takes beside its result: copies of cores, and blocks."""
    blocks = 4 * 8 * BLOCK_ENTRIES
    if plan.tanh and 0 < plan.start < 1:
        return blocks + 16 * plan.shared_parameters
    core = plan.rank**2 * math.prod(plan.shape[2:]) if plan.kernel else 0
    return blocks + core * (8 * len(_shared(plan)) + 4)


# The sum of a composed weight's entries, and of their squares


def _is_linear(plan: WeightPlan) -> bool:
    """Return whether the weight is one operand times a number, as private ones are zero."""
    shared = plan.method.operands - len(plan.method.private)
    return is_known(plan.method) and shared == 1 and not plan.tanh


def _linear_sums(plan: WeightPlan, factors: DrawnFactors) -> tuple[float, float]:
    """Return both sums for W = s X R without composing it: <X'X, R R'>, with R = Y' or a core."""
    side = _Side(plan, factors, _shared(plan)[0], factors.exact)
    left = _gram(factors.exact(side.x[part]) for part in _parts(len(side.x), plan.rank))
    right = _gram(side.columns(part) for part in _parts(plan.shape[1], plan.rank * side.width))
    gain = plan.gains[side.place] * plan.outer
    return gain * float(left[0] @ right[0]), gain * gain * float((left[1] * right[1]).sum())


def _gram(blocks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of some rows, and the sum of their outer products."""
    total = square = torch.zeros((), dtype=torch.float64, device="cpu")
    for rows in blocks:
        total, square = total + rows.sum(0), square + rows.T @ rows
    return total, square


def _sums(plan: WeightPlan, factors: DrawnFactors, cast: Cast) -> tuple[float, float]:
    """Return both sums from tiles of the weight, which may not fit into memory."""
    sides = [_Side(plan, factors, place, cast) for place in _shared(plan)]
    width = sides[0].width
    total = square = 0.0
    for part in _parts(plan.shape[1], max(BLOCK_ENTRIES // TILE, plan.rank) * width):
        columns = [side.columns(part) for side in sides]
        for rows in _parts(plan.shape[0], len(columns[0])):
            tile = _tile(plan, sides, columns, rows)
            total += float(tile.sum(dtype=torch.float64))
            square += float(tile.square().sum(dtype=torch.float64))
    return plan.outer * total, plan.outer**2 * square


def _tile(
    plan: WeightPlan, sides: Sequence[_Side], columns: Sequence[Tensor], rows: slice
) -> Tensor:
    """Return some rows and columns of the weight."""
    values = {}
    for side, own in zip(sides, columns, strict=True):
        value = (side.cast(side.x[rows]) * plan.gains[side.place]) @ own.T
        values[side.place] = torch.tanh(value) if plan.tanh else value
    like = next(iter(values.values()))
    zero = like.new_zeros(()).expand_as(like)
    return plan.method.combine([values.get(n, zero) for n in range(plan.method.operands)])


class _Side:
    """The factors of an operand X R, of which R' = Y for a matrix, and else follows from a core."""

    def __init__(self, plan: WeightPlan, factors: DrawnFactors, place: int, cast: Cast) -> None:
        self.place = place
        self.cast = cast
        self.x = factors.drawn[f"x{place + 1}"]
        self.width = math.prod(plan.shape[2:])
        self._y = factors.drawn[f"y{place + 1}"]
        self._core: Tensor | None = None
        if plan.kernel:
            core = factors.drawn[f"t{place + 1}"].flatten(2).transpose(0, 1)
            self._core = cast(core.reshape(len(core), -1))  # (R, R*k1*...)

    def columns(self, part: slice) -> Tensor:
        """Return those rows of R' that belong to a part of Y, shape (len * k1 * ..., R)."""
        y = self.cast(self._y[part])
        if self._core is None:
            return y
        rank = y.shape[1]
        return (y @ self._core).view(len(y), rank, -1).transpose(1, 2).reshape(-1, rank)


def _shared(plan: WeightPlan) -> list[int]:
    return [place for place in range(plan.method.operands) if place not in plan.method.private]


def _parts(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK_ENTRIES // max(width, 1))
    return (slice(first, first + step) for first in range(0, rows, step))
