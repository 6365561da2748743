"""Published states: each lies a whole number of power-of-two steps away from the one before.

The difference between any two of them is then a whole number of the smallest step in between, which
`fedpara_plugins.stages.grid` finds and codes exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpara_plugins.stages.checks import all_finite
from fedpara_plugins.stages.stage import REAL_DTYPES, Tensors

__all__ = ["PublishedState", "publish"]

FIRST_BITS = 8
"""The first published state carries whole weights. Until updates have been seen, its steps lie this
many bits below a tensor's root mean square."""
ONE_DIMENSION = 1 / 32
"""Steps of tensors of one dimension, relative to others: biases and norms are few, and matter."""
STEADY = 0.75
"""A step stays while the ideal one is within this many bits: it follows trends, not noise."""
_HEADROOM = 2
"""Bits by which values may grow before the finest step can no longer be represented."""
_WIDEST = 28
"""Largest number of significant bits, also of float64: symbols must fit into 32 bits."""


@dataclass(frozen=True)
class PublishedState:
    """A state on the grid.

    Attributes:
        state: the tensors as clients hold them; those without steps are exact.
        exponents: exponents of the steps that led to the state, by name; None before any update was
            seen.
    """

    state: Tensors
    exponents: Mapping[str, int | None]


def publish(
    wanted: Mapping[str, Tensor], before: PublishedState, *, coarseness: float
) -> PublishedState:
    """Return the state on the grid that is nearest to ``wanted``.

    Args:
        wanted: the server's exact state.
        before: the state that was published last, or version 0 without exponents; it has the same
            names.
        coarseness: size of the steps relative to the root mean square of a round's update.
    """
    state: Tensors = {}
    exponents: dict[str, int | None] = {}
    for name, value in wanted.items():
        state[name] = value.detach().cpu().clone()
        if value.dtype not in REAL_DTYPES or not value.ndim or not value.numel():
            continue
        old = before.state[name].double()
        exact = state[name].double()
        if not (all_finite(exact) and all_finite(old)):
            continue
        first = name not in before.exponents
        known = before.exponents.get(name)
        share = coarseness * (ONE_DIMENSION if value.ndim == 1 else 1)
        gap = exact - old
        exponent = _first_exponent(exact, gap) if first else _next_exponent(gap, known, share)
        exponents[name] = exponent
        if exponent is None:
            state[name] = before.state[name].clone()
            continue
        exponent = max(exponent, _finest_exponent(value.dtype, exact))
        step = math.ldexp(1.0, exponent)
        near = old + (gap / step).round() * step
        state[name] = _cast(near, value.dtype)
        exponents[name] = exponent
    return PublishedState(state, exponents)


def _first_exponent(exact: Tensor, gap: Tensor) -> int | None:
    """Return the first step's exponent; None while nothing has moved from version 0."""
    size = _rms(exact)
    return None if not bool(gap.any()) else _floor_log2(size) - FIRST_BITS


def _next_exponent(gap: Tensor, known: int | None, share: float) -> int | None:
    """Return the step's exponent for the size of the update since the last state."""
    # The rounding of the last state is part of the gap, but not of the update.
    rounding = 0.0 if known is None else 4.0**known / 12
    update = _rms(gap) ** 2 - rounding
    if update <= 0 or not bool(gap.any()):
        return known
    ideal = math.log2(share) + math.log2(update) / 2
    if known is not None and abs(ideal - known) < STEADY:
        return known
    return round(ideal)


def _finest_exponent(dtype: torch.dtype, exact: Tensor) -> int:
    """Return the finest exponent whose multiples the dtype represents at these values' size."""
    digits = min(1 - round(math.log2(torch.finfo(dtype).eps)), _WIDEST)
    largest = max(float(exact.abs().max()), torch.finfo(dtype).tiny)
    return _floor_log2(largest) + 1 + _HEADROOM - digits


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    # Adding 0.0 turns negative zeros, which are not on the grid, into positive ones.
    return values.clamp_(-largest, largest).to(dtype) + 0.0


def _rms(values: Tensor) -> float:
    return math.sqrt(float(values.square().mean()))


def _floor_log2(value: float) -> int:
    return math.frexp(max(value, 1e-300))[1] - 1
