"""The contract of a codec stage, and the few things that every stage needs.

A stage is a pair of pure functions. New stage = one file with one subclass of `Stage`, and one
test class that inherits `fedpara_plugins.testing.stage_contract.StageContract`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from fedpara_plugins.errors import ConfigError, PayloadError

__all__ = [
    "DTYPES",
    "MAX_TENSORS",
    "REAL_DTYPES",
    "STREAM_DTYPES",
    "Notes",
    "Stage",
    "Tensors",
    "byte_size",
    "check_booleans",
    "check_count",
    "check_limit",
    "check_notes",
    "dtype_name",
    "pack_dtypes",
    "tensor_bytes",
    "tensor_from_bytes",
    "unpack_dtypes",
]

Tensors: TypeAlias = dict[str, torch.Tensor]
"""Named tensors; the order of the names is part of the value."""

Notes: TypeAlias = dict[str, Any]
"""What a stage's decoder needs besides the tensors: small, plain JSON, with string keys."""

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
"""What arithmetic stages act on; float8 and complex tensors pass through them as integers do."""

STREAM_DTYPES: Mapping[str, torch.dtype] = {**DTYPES, "C128": torch.complex128}
"""What an entropy coder's stream can hold: more than a safetensors file can."""

MAX_TENSORS = 2**16
"""Tensors of a payload: each takes half a kilobyte whatever its size, which no limit counts."""

_NAMES = {dtype: name for name, dtype in STREAM_DTYPES.items()}
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_PASSED = "-"


class Stage(abc.ABC):
    """One reversible step between named tensors and named tensors; stateless, so shared freely.

    Attributes:
        name: what users write in ``codec = "a+b"``; letters, digits, ``_``, ``-`` and ``.``.
        lossless: decoding gives back the very same bits.
        needs_reference: works against tensors that sender and receiver both hold.
        selects: sends some of the values only, so it comes before what shortens them.
        shortens: writes each value with fewer bits; a chain has one such stage at most.
        sorts: writes values as bytes in another order, which only an entropy coder makes use of.
        entropy: the output is one opaque stream, so no other stage can follow.
    """

    name: str
    lossless: bool
    needs_reference: bool = False
    selects: bool = False
    shortens: bool = False
    sorts: bool = False
    entropy: bool = False

    @property
    def options(self) -> Mapping[str, str]:
        """What this instance was configured with, as in the codec's text; decoding needs none."""
        return {}

    @property
    def text(self) -> str:
        """Name and options as users write them, such as ``quantise:bits=4,scope=row``."""
        given = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{given}" if given else self.name

    def with_options(self, options: Mapping[str, str]) -> Stage:
        """A stage of this kind with these options, everything else at its default.

        Args:
            options: keys and values of the codec's text, as text.

        Raises:
            ConfigError: an unknown option, or a value that does not fit; this base knows none.
        """
        if options:
            raise ConfigError(
                f"stage {self.name!r} has no options, got {', '.join(sorted(options))}; "
                f"write {self.name!r} alone"
            )
        return self

    @abc.abstractmethod
    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Code tensors; neither argument is modified.

        Tensors that the stage does not act on are passed on under their names.

        Raises:
            PayloadError: a tensor cannot be coded; the message names it and a remedy.
            MismatchError: the reference is missing or does not fit.
        """

    @abc.abstractmethod
    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Undo `encode`: same names in the same order, same shapes, same dtypes.

        Everything but the reference comes from the network and may be hostile. Check sizes
        against ``limit`` (bytes of all tensors returned) before allocating.

        Raises:
            PayloadError: tensors or notes are not what `encode` makes, or exceed the limit.
            MismatchError: the reference is missing or does not fit.
        """


def dtype_name(dtype: torch.dtype) -> str:
    """The name in `STREAM_DTYPES`.

    Raises:
        PayloadError: the dtype is not among them.
    """
    if dtype not in _NAMES:
        raise PayloadError(f"dtype {dtype} cannot travel; these can: {', '.join(STREAM_DTYPES)}")
    return _NAMES[dtype]


def byte_size(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor, in integers without bound: declared shapes may be absurd."""
    return dtype.itemsize * math.prod(shape)


def check_limit(size: int, limit: int, what: str) -> None:
    """Refuse an output of ``size`` bytes that exceeds ``limit``.

    Raises:
        PayloadError: it does.
    """
    if size > limit:
        raise PayloadError(
            f"{what} would take {size} bytes, more than the limit of {limit} bytes that this "
            "side's own model sets: the payload is of another model, or forged"
        )


def check_count(count: int, what: str) -> None:
    """Refuse more than `MAX_TENSORS` tensors.

    Raises:
        PayloadError: there are.
    """
    if count > MAX_TENSORS:
        raise PayloadError(f"{what} names {count} tensors, more than the {MAX_TENSORS} allowed")


def check_notes(stage: str, notes: Notes, fields: Mapping[str, type]) -> None:
    """Require exactly these fields with exactly these types.

    Raises:
        PayloadError: a field is missing, unknown or of another type.
    """
    found = {key: type(value).__name__ for key, value in notes.items()}
    expected = {key: kind.__name__ for key, kind in fields.items()}
    if found != expected:
        raise PayloadError(f"stage {stage!r}: expected the notes {expected}, got {found}")


def pack_dtypes(dtypes: Sequence[torch.dtype | None]) -> Notes:
    """Notes ``dtypes`` (a table) and ``each`` (a digit of base 36 a tensor, ``-`` for None)."""
    table = list(dict.fromkeys(dtype for dtype in dtypes if dtype is not None))
    digits = {dtype: _DIGITS[place] for place, dtype in enumerate(table)}
    each = "".join(_PASSED if dtype is None else digits[dtype] for dtype in dtypes)
    return {"dtypes": [dtype_name(dtype) for dtype in table], "each": each}


def unpack_dtypes(notes: Notes, count: int) -> list[torch.dtype | None]:
    """Undo `pack_dtypes` for ``count`` tensors; the two fields' types are checked already.

    Raises:
        PayloadError: unknown dtype, another count, or a digit without an entry in the table.
    """
    table, each = notes["dtypes"], notes["each"]
    unknown = [name for name in table if not (isinstance(name, str) and name in STREAM_DTYPES)]
    if unknown:
        raise PayloadError(f"unknown dtypes {unknown[:3]!r}; known are {', '.join(STREAM_DTYPES)}")
    if len(each) != count:
        raise PayloadError(f"expected the dtypes of {count} tensors, got those of {len(each)}")
    known: dict[str, torch.dtype | None] = {_PASSED: None}
    known.update(zip(_DIGITS, (STREAM_DTYPES[name] for name in table), strict=False))
    if not set(each) <= set(known):
        raise PayloadError(f"dtype digits {sorted(set(each) - set(known))!r} are not in the table")
    return [known[digit] for digit in each]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, row-major and little-endian (hosts are taken to be little-endian)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_from_bytes(
    data: memoryview, dtype: torch.dtype, shape: Sequence[int], *, name: str
) -> torch.Tensor:
    """A tensor of its own memory from ``byte_size(dtype, shape)`` bytes.

    Raises:
        PayloadError: torch cannot make that shape, or a boolean byte is neither 0 nor 1.
    """
    try:
        if not data:
            return torch.empty(tuple(shape), dtype=dtype)
        tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(tuple(shape))
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise PayloadError(f"tensor {name!r}: no tensor can have this shape: {error}") from error
    check_booleans(name, tensor)
    return tensor


def check_booleans(name: str, tensor: torch.Tensor) -> None:
    """Refuse boolean tensors with other bytes than 0 and 1, which torch computes nonsense with.

    Raises:
        PayloadError: there is such a byte.
    """
    if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise PayloadError(f"tensor {name!r}: a boolean byte is neither 0 nor 1")
