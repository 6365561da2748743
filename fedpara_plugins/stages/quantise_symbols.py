"""The integers of stage ``quantise``: the narrowest type, with an escape for what lies far out.

One outlier would otherwise double the bytes of a whole tensor, and an entropy coder of bytes does
badly on wider integers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["ESCAPE", "SYMBOL_DTYPES", "Symbols", "escaped", "far_dtype", "narrowed"]

SYMBOL_DTYPES = (torch.int8, torch.int16, torch.int32)
NEAR, ESCAPE = 127, -128
_FAR_SHARE = 16
"""At most one value in that many escapes; with more of them, wider symbols are smaller."""
_FEW = {torch.int16: 2**15 - 1, torch.int32: 2**31 - 1}


class Symbols(NamedTuple):
    """Integers, and in order the values (int32) that stand behind each -128 of an int8 tensor."""

    near: torch.Tensor
    far: torch.Tensor


def narrowed(counts: NDArray[np.floating], most: int) -> Symbols | None:
    """Whole numbers as integers; None where 32 bits do not hold them.

    Args:
        counts: contiguous; spoilt.
        most: a bound of their magnitude.
    """
    none = torch.empty(0, dtype=torch.int32)
    if most <= NEAR:
        return Symbols(torch.from_numpy(counts.astype(np.int8)), none)
    flat = counts.reshape(-1)
    places = np.flatnonzero(np.abs(flat) > NEAR)
    values = flat[places]
    largest = float(np.abs(values).max(initial=0.0))
    if largest > _FEW[torch.int32]:
        return None
    if _FAR_SHARE * len(values) > len(flat):
        return Symbols(torch.from_numpy(counts).to(far_dtype(largest)), none)
    flat[places] = ESCAPE
    far = torch.from_numpy(values.astype(np.int32))
    return Symbols(torch.from_numpy(counts.astype(np.int8)), far)


def far_dtype(largest: float) -> torch.dtype:
    """The narrower of int16 and int32 that holds numbers up to ``largest``."""
    return next(dtype for dtype, top in _FEW.items() if largest <= top)


def escaped(near: torch.Tensor) -> NDArray[np.bool_]:
    """Which of the symbols, in row-major order, escape; no places where none can."""
    # As a mask, and in numpy: places take eight bytes each, torch three times as long.
    flat = near.reshape(-1) if near.dtype == torch.int8 else near.new_empty(0)
    mask: NDArray[np.bool_] = np.equal(flat.numpy(), ESCAPE)
    return mask
