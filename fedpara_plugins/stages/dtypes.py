"""The dtypes that a payload can hold, their names in notes, and tensors as bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedpara_plugins.errors import PayloadError

__all__ = [
    "DTYPES",
    "REAL_DTYPES",
    "STREAM_DTYPES",
    "SYMBOL_DTYPES",
    "arithmetic_dtype",
    "byte_size",
    "check_booleans",
    "dtype_name",
    "empty_tensor",
    "pack_dtypes",
    "tensor_bytes",
    "unpack_dtypes",
]

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that torch and safetensors share, by safetensors' names."""

REAL_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""The dtypes that arithmetic stages act on; float8 and complex tensors pass like integers."""

STREAM_DTYPES: Mapping[str, torch.dtype] = {**DTYPES, "C128": torch.complex128}
"""The dtypes that an entropy coder's stream can hold: more than a safetensors file can."""

SYMBOL_DTYPES = (torch.int8, torch.int16, torch.int32)
"""The dtypes of the integers that lossy stages write and entropy stages code."""

_NAMES = {dtype: name for name, dtype in STREAM_DTYPES.items()}
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_UNCHANGED = "-"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name in `STREAM_DTYPES`.

    Raises:
        PayloadError: the dtype is not among them.
    """
    if dtype not in _NAMES:
        raise PayloadError(f"dtype {dtype} cannot be sent; these can: {', '.join(STREAM_DTYPES)}")
    return _NAMES[dtype]


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which stages compute with tensors of a dtype: float32 or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def byte_size(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor as an unbounded integer, since declared shapes may be absurd."""
    return dtype.itemsize * math.prod(shape)


def pack_dtypes(dtypes: Sequence[torch.dtype | None]) -> dict[str, Any]:
    """Return the notes that list dtypes.

    Args:
        dtypes: one for each tensor; None for a tensor that passed unchanged.

    Returns:
        ``dtypes``, a table of names, and ``each``, text with one character for each tensor: a digit
        of base 36 that points into the table, or ``-`` for None.
    """
    table = list(dict.fromkeys(dtype for dtype in dtypes if dtype is not None))
    digits = {dtype: _DIGITS[place] for place, dtype in enumerate(table)}
    each = "".join(_UNCHANGED if dtype is None else digits[dtype] for dtype in dtypes)
    return {"dtypes": [dtype_name(dtype) for dtype in table], "each": each}


def unpack_dtypes(notes: Mapping[str, Any], count: int) -> list[torch.dtype | None]:
    """Undo `pack_dtypes` for ``count`` tensors.

    Args:
        notes: ``dtypes`` is a list and ``each`` is text; the caller has checked that.
        count: number of tensors.

    Raises:
        PayloadError: a dtype is unknown, the count differs, or a digit is not in the table.
    """
    table, each = notes["dtypes"], notes["each"]
    unknown = [name for name in table if not (isinstance(name, str) and name in STREAM_DTYPES)]
    if unknown:
        raise PayloadError(f"unknown dtypes {unknown[:3]!r}; known are {', '.join(STREAM_DTYPES)}")
    if len(each) != count:
        raise PayloadError(f"expected the dtypes of {count} tensors, got those of {len(each)}")
    known: dict[str, torch.dtype | None] = {_UNCHANGED: None}
    known.update(zip(_DIGITS, (STREAM_DTYPES[name] for name in table), strict=False))
    if not set(each) <= set(known):
        raise PayloadError(f"dtype digits {sorted(set(each) - set(known))!r} are not in the table")
    return [known[digit] for digit in each]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes, row-major and little-endian (the host must be little-endian)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def empty_tensor(name: str, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor with any content.

    Raises:
        PayloadError: torch cannot make that shape.
    """
    try:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise PayloadError(f"tensor {name!r}: no tensor can have this shape: {error}") from error


def check_booleans(name: str, tensor: torch.Tensor) -> None:
    """Raise unless every byte of a boolean tensor is 0 or 1; torch miscomputes with others.

    Raises:
        PayloadError: a byte has another value.
    """
    if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise PayloadError(f"tensor {name!r}: a boolean byte is neither 0 nor 1")
