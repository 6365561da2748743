"""The integers of stage ``quantise``: the narrowest type, with an escape for outliers.

Without it, one outlier would double the bytes of a whole tensor, and an entropy coder of bytes
compresses wider integers badly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["ESCAPE", "Symbols", "escape_mask", "far_dtype", "narrowest_symbols"]

NEAR, ESCAPE = 127, -128
_FAR_SHARE = 16
"""At most one value in 16 escapes; with more of them, wider symbols take fewer bytes."""
_FAR_MAXIMA = {torch.int16: 2**15 - 1, torch.int32: 2**31 - 1}


class Symbols(NamedTuple):
    """Integers ``near``; ``far`` has the value (int32) of each -128 in an int8 tensor, in order."""

    near: torch.Tensor
    far: torch.Tensor


def narrowest_symbols(counts: NDArray[np.floating], most: int) -> Symbols | None:
    """Return whole numbers as integers; None if they need more than 32 bits.

    Args:
        counts: contiguous; overwritten.
        most: a bound of their magnitude.
    """
    none = torch.empty(0, dtype=torch.int32)
    if most <= NEAR:
        return Symbols(torch.from_numpy(counts.astype(np.int8)), none)
    flat = counts.reshape(-1)
    places = np.flatnonzero(np.abs(flat) > NEAR)
    values = flat[places]
    largest = float(np.abs(values).max(initial=0.0))
    if largest > _FAR_MAXIMA[torch.int32]:
        return None
    if _FAR_SHARE * len(values) > len(flat):
        return Symbols(torch.from_numpy(counts).to(far_dtype(largest)), none)
    flat[places] = ESCAPE
    far = torch.from_numpy(values.astype(np.int32))
    return Symbols(torch.from_numpy(counts.astype(np.int8)), far)


def far_dtype(largest: float) -> torch.dtype:
    """Return the narrower of int16 and int32 that holds numbers up to ``largest``."""
    return next(dtype for dtype, top in _FAR_MAXIMA.items() if largest <= top)


def escape_mask(near: torch.Tensor) -> NDArray[np.bool_]:
    """Return which symbols escape, in row-major order; empty if the type has no escape."""
    # A numpy mask: indices would take eight bytes each, and torch takes three times as long.
    flat = near.reshape(-1) if near.dtype == torch.int8 else near.new_empty(0)
    mask: NDArray[np.bool_] = np.equal(flat.numpy(), ESCAPE)
    return mask
