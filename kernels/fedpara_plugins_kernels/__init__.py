"""Composes FedPara weights and their gradients in C++, on memory that the caller owns.

`fedpara_plugins.fast.native` calls this; nothing here knows torch. See ``kernels.cpp`` for what is
computed and for the meaning of the structures' fields.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

from fedpara_plugins_kernels._version import __version__

__all__ = ["API", "COLUMNS", "Operand", "__version__", "compose", "describe", "gradients"]

API = 2
"""Of these functions; `fedpara_plugins` uses one that it knows."""

COLUMNS = 128
"""Work can be divided at multiples of this many columns of the weight."""

Operand = tuple[int, int, int, int, int]
"""Addresses of x (rows, rank), a (columns, rank), dx and da (the same, or both 0), and the rank."""

_LAYOUT = struct.Struct("@2q 2f 4Pq 4Pq 4Pq")  # `Weight` in kernels.cpp

_library = ctypes.CDLL(str(Path(__file__).parent / "_kernels.so"))
for _name in ("fedpara_compose", "fedpara_gradients"):
    getattr(_library, _name).argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)
_compose, _gradients = _library.fedpara_compose, _library.fedpara_gradients


def describe(
    shape: tuple[int, int],
    scale: float,
    shift: float,
    first: Operand,
    second: Operand,
    *,
    weight: int = 0,
    gradient: int = 0,
    outputs: int = 0,
    inputs: int = 0,
    batch: int = 0,
) -> bytes:
    """What `compose` and `gradients` work on: scale * (x1 a1ᵀ) * (x2 a2ᵀ + shift).

    All addresses are of contiguous float32 in rows; nothing checks them.

    Args:
        shape: of the weight, (rows, columns).
        scale: see above.
        shift: see above.
        first: x1, a1, ...
        second: x2, a2, ...
        weight: where `compose` writes it.
        gradient: by the weight, for `gradients`; 0 if it is outputsᵀ inputs.
        outputs: (batch, rows).
        inputs: (batch, columns).
        batch: rows of outputs and inputs.
    """
    return _LAYOUT.pack(
        *shape, scale, shift, weight, gradient, outputs, inputs, batch, *first, *second
    )


def compose(description: bytes, start: int, end: int) -> None:
    """Write columns ``start`` to ``end`` of the weight.

    Raises:
        MemoryError: there is none to work in.
    """
    if _compose(description, start, end):
        raise MemoryError("no memory to compose a weight in")


def gradients(description: bytes, start: int, end: int) -> None:
    """Write these rows of both da, and these columns' share of both dx.

    Raises:
        MemoryError: there is none to work in.
    """
    if _gradients(description, start, end):
        raise MemoryError("no memory to compute a weight's gradient in")


if not _library.fedpara_supported():
    raise ImportError(
        "fedpara-plugins-kernels needs a processor with AVX2 and FMA, which this one lacks"
    )
