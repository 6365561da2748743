"""FedPara weights and their gradients composed in C++, on memory that the caller owns.

`fedpara_plugins.factors.fast.native` calls these functions; they know nothing of torch. For what
they compute and for the meaning of the structures' fields see ``kernels.cpp``.
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
"""Version of these functions; `fedpara_plugins` calls one version only."""

COLUMNS = 128
"""Work can be divided at multiples of this many columns of the weight, or rows for `linear`."""

Operand = tuple[int, int, int, int, int]
"""The addresses of x (rows, rank), a (columns, rank), and of dx and da, which have the same shapes
or are both 0; and the rank."""

Linear = tuple[int, int, int, int, int, int]
"""The batch size B of a linear layer, and the addresses of inputs (B, columns), bias (rows,) or 0,
output (B, rows), and the gradients by the output and by the inputs; the last is 0 if not needed."""

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
    """Describe the data of the functions below: W = scale * (x1 a1ᵀ) * (x2 a2ᵀ + shift).

    All addresses are of contiguous float32, in row-major order, or 0 if there is no such array.
    Nothing checks them.

    Args:
        shape: of the weight, (rows, columns).
        scale: see above.
        shift: see above.
        weight: the address that `compose` writes to.
        gradient: the address of the weight's gradient, for `gradients`; 0 for a linear layer.
        first: x1, a1, ...
        second: x2, a2, ...
        linear: the arrays of `linear`, and of `gradients` without ``gradient``.
    """
    return _LAYOUT.pack(*shape, scale, shift, weight, gradient, *first, *second, *linear)


def compose(description: bytes, start: int, end: int) -> None:
    """Write columns ``start`` to ``end`` of the weight.

    Raises:
        MemoryError: there is no memory for intermediate results.
    """
    if _compose(description, start, end):
        raise MemoryError("no memory to compose a weight in")


def gradients(description: bytes, start: int, end: int) -> None:
    """Write the gradients that columns ``start`` to ``end`` of the weight contribute to.

    These are the columns' rows of both da, their share of both dx, and for a linear layer these
    columns of the inputs' gradient.

    Raises:
        MemoryError: there is no memory for intermediate results.
    """
    if _gradients(description, start, end):
        raise MemoryError("no memory to compute a weight's gradient in")


def linear(description: bytes, start: int, end: int) -> None:
    """Write columns ``start`` to ``end`` of the output.

    Raises:
        MemoryError: there is no memory for intermediate results.
    """
    if _linear(description, start, end):
        raise MemoryError("no memory to compute a linear layer's output in")


if not _library.fedpara_supported():
    raise ImportError(
        "fedpara-plugins-kernels needs a processor with AVX2 and FMA, which this one lacks"
    )
