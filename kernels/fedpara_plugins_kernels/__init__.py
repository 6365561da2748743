"""Composes FedPara weights and their gradients in C++, on memory that the caller owns.

`fedpara_plugins.factors.fast.native` calls this; nothing here knows torch. See ``kernels.cpp`` for
what is computed and for the meaning of the structures' fields.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

from fedpara_plugins_kernels._version import __version__

__all__ = [
    "API",
    "COLUMNS",
    "Linear",
    "Operand",
    "__version__",
    "compose",
    "describe",
    "gradients",
    "linear",
]

API = 3
"""Of these functions; `fedpara_plugins` uses one that it knows."""

COLUMNS = 128
"""Work can be divided at multiples of this many columns of the weight, or rows for `linear`."""

Operand = tuple[int, int, int, int, int]
"""Addresses of x (rows, rank), a (columns, rank), dx and da (the same, or both 0), and the rank."""

Linear = tuple[int, int, int, int, int, int]
"""The batch B of a linear layer, and addresses of inputs (B, columns), bias (rows,) or 0, output
(B, rows), and the gradients by the output and by the inputs, the last 0 if nobody wants it."""

_LAYOUT = struct.Struct("@2q 2f 2P 4Pq 4Pq q5P")  # `Weight` in kernels.cpp

_library = ctypes.CDLL(str(Path(__file__).parent / "_kernels.so"))
for _name in ("fedpara_compose", "fedpara_gradients", "fedpara_linear"):
    getattr(_library, _name).argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)
_compose, _gradients = _library.fedpara_compose, _library.fedpara_gradients
_linear = _library.fedpara_linear


def describe(
    shape: tuple[int, int],
    scale: float,
    shift: float,
    weight: int,
    gradient: int,
    first: Operand,
    second: Operand,
    linear: Linear = (0, 0, 0, 0, 0, 0),
) -> bytes:
    """What the functions below work on: W = scale * (x1 a1ᵀ) * (x2 a2ᵀ + shift).

    All addresses are of contiguous float32 in rows, 0 for what is not there; nothing checks them.

    Args:
        shape: of the weight, (rows, columns).
        scale: see above.
        shift: see above.
        weight: where `compose` writes it.
        gradient: by the weight, for `gradients`; 0 if it is that of a linear layer.
        first: x1, a1, ...
        second: x2, a2, ...
        linear: what `linear` and, without ``gradient``, `gradients` work on.
    """
    return _LAYOUT.pack(*shape, scale, shift, weight, gradient, *first, *second, *linear)


def compose(description: bytes, start: int, end: int) -> None:
    """Write columns ``start`` to ``end`` of the weight.

    Raises:
        MemoryError: there is none to work in.
    """
    if _compose(description, start, end):
        raise MemoryError("no memory to compose a weight in")


def gradients(description: bytes, start: int, end: int) -> None:
    """Write, of these columns of the weight, the rows of both da, the share of both dx, d_inputs.

    Raises:
        MemoryError: there is none to work in.
    """
    if _gradients(description, start, end):
        raise MemoryError("no memory to compute a weight's gradient in")


def linear(description: bytes, start: int, end: int) -> None:
    """Write columns ``start`` to ``end`` of the output.

    Raises:
        MemoryError: there is none to work in.
    """
    if _linear(description, start, end):
        raise MemoryError("no memory to compute a linear layer's output in")


if not _library.fedpara_supported():
    raise ImportError(
        "fedpara-plugins-kernels needs a processor with AVX2 and FMA, which this one lacks"
    )
