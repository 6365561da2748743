"""Composes FedPara weights and their gradients in C++, on memory that the caller owns.

`fedpara_plugins.fast.native` calls this; nothing here knows torch. See ``kernels.cpp`` for what is
computed and for the meaning of the structures' fields.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from fedpara_plugins_kernels._version import __version__

__all__ = [
    "API",
    "COLUMNS",
    "Operand",
    "Weight",
    "__version__",
    "compose",
    "gradients",
    "kept",
    "padded",
]

API = 1
"""Of these functions; `fedpara_plugins` uses one that it knows."""

COLUMNS = 128
"""Work can be divided at multiples of this many columns of the weight."""


class Operand(ctypes.Structure):
    """x (rows, rank), contiguous, and a (rank, columns) with strides; gradients for both, or null.

    dx has ``padded(rank)`` columns, of which those beyond the rank are zero.
    """

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("dx", ctypes.c_void_p),
        ("da", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("a_row", ctypes.c_int64),
        ("a_column", ctypes.c_int64),
    )


class Weight(ctypes.Structure):
    """scale * (x1 a1) * (x2 a2 + shift), shape (rows, columns), float32 and contiguous."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("shift", ctypes.c_float),
        ("weight", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("operand", Operand * 2),
    )


_library = ctypes.CDLL(str(Path(__file__).parent / "_kernels.so"))
_library.fedpara_kept.argtypes = (ctypes.c_void_p,)
_library.fedpara_kept.restype = ctypes.c_int64
for _name in ("fedpara_compose", "fedpara_gradients"):
    getattr(_library, _name).argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def compose(weight: Weight, start: int, end: int) -> None:
    """Write columns ``start`` to ``end`` of the weight.

    Raises:
        MemoryError: there is none to work in.
    """
    if _library.fedpara_compose(ctypes.byref(weight), start, end):
        raise MemoryError("no memory to compose a weight in")


def kept(weight: Weight) -> int:
    """Floats of memory to keep the two products in, for the field ``kept``."""
    return int(_library.fedpara_kept(ctypes.byref(weight)))


def gradients(weight: Weight, start: int, end: int) -> None:
    """Write these columns of both da, and their share of both dx.

    Raises:
        MemoryError: there is none to work in.
    """
    if _library.fedpara_gradients(ctypes.byref(weight), start, end):
        raise MemoryError("no memory to compute a weight's gradient in")


def padded(rank: int) -> int:
    """Columns of dx."""
    return -(-rank // 4) * 4


if not _library.fedpara_supported():
    raise ImportError(
        "fedpara-plugins-kernels needs a processor with AVX2 and FMA, which this one lacks"
    )
