"""Where published states lie: each a whole number of power-of-two steps from the one before.

Then the difference between any two of them is a whole number of the smallest step in between, and
`fedpara_plugins.stages.grid` finds and codes it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpara_plugins.stages.stage import REAL_DTYPES, Tensors

__all__ = ["Published", "publish"]

FIRST_BITS = 8
"""The first state that is published carries whole weights: its steps are this many bits below a
tensor's root mean square, until updates have been seen."""
FLAT = 1 / 32
"""Steps of tensors of one dimension, relative to others': biases and norms are few and matter."""
STEADY = 0.75
"""A step is kept while the wanted one is within this many bits: it follows trends, not noise."""
_HEADROOM = 2
"""Bits by which values may grow before the finest step can no longer be represented."""
_WIDEST = 28
"""Significant bits at most, also of float64: symbols must fit 32 bits."""


@dataclass(frozen=True)
class Published:
    """A state on the grid.

    Attributes:
        state: the tensors, as clients hold them; those that have no steps are exact.
        exponents: of the steps that led to it, by name; None before any update was seen.
    """

    state: Tensors
    exponents: Mapping[str, int | None]


def publish(wanted: Mapping[str, Tensor], before: Published, *, coarseness: float) -> Published:
    """The state on the grid that is nearest to ``wanted``.

    Args:
        wanted: the server's exact state.
        before: what was published last, or version 0 with no exponents; of equal names.
        coarseness: steps, relative to the root mean square of a round's update.
    """
    state: Tensors = {}
    exponents: dict[str, int | None] = {}
    for name, value in wanted.items():
        state[name] = value.detach().cpu().clone()
        if value.dtype not in REAL_DTYPES or not value.ndim or not value.numel():
            continue
        old = before.state[name].double()
        exact = state[name].double()
        if not bool(torch.isfinite(exact).all()):
            continue
        first = name not in before.exponents
        known = before.exponents.get(name)
        share = coarseness * (FLAT if value.ndim == 1 else 1)
        exponent = _first(exact, exact - old) if first else _next(exact - old, known, share)
        exponents[name] = exponent
        if exponent is None:
            state[name] = before.state[name].clone()
            continue
        exponent = max(exponent, _finest(value.dtype, exact))
        step = math.ldexp(1.0, exponent)
        near = old + ((exact - old) / step).round() * step
        state[name] = _within(near, value.dtype)
        exponents[name] = exponent
    return Published(state, exponents)


def _first(exact: Tensor, gap: Tensor) -> int | None:
    """None while nothing has moved: version 0 itself is published."""
    size = _rms(exact)
    return None if not bool(gap.any()) else _floor_log2(size) - FIRST_BITS


def _next(gap: Tensor, known: int | None, share: float) -> int | None:
    """From the update since the last state, whose own rounding is not counted as one."""
    rounding = 0.0 if known is None else 4.0**known / 12
    update = _rms(gap) ** 2 - rounding
    if update <= 0 or not bool(gap.any()):
        return known
    ideal = math.log2(share) + math.log2(update) / 2
    if known is not None and abs(ideal - known) < STEADY:
        return known
    return round(ideal)


def _finest(dtype: torch.dtype, exact: Tensor) -> int:
    """The finest exponent whose multiples the dtype still holds at the size of these values."""
    digits = min(1 - round(math.log2(torch.finfo(dtype).eps)), _WIDEST)
    largest = max(float(exact.abs().max()), torch.finfo(dtype).tiny)
    return _floor_log2(largest) + 1 + _HEADROOM - digits


def _within(values: Tensor, dtype: torch.dtype) -> Tensor:
    top = torch.finfo(dtype).max
    # The sum turns negative zeros, which have no place on a grid, into ordinary ones.
    return values.clamp_(-top, top).to(dtype) + 0.0


def _rms(values: Tensor) -> float:
    return math.sqrt(float(values.square().mean()))


def _floor_log2(value: float) -> int:
    return math.frexp(max(value, 1e-300))[1] - 1
