"""What the entropy stages share: which tensors stand behind one stream of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.checks import is_shape
from fedpara_plugins.stages.stage import (
    Notes,
    Tensors,
    byte_size,
    check_count,
    check_notes,
    pack_dtypes,
    tensor_bytes,
    tensor_from_bytes,
    unpack_dtypes,
)

__all__ = ["STREAM", "Layout", "as_stream", "cut", "layout_notes", "one_stream", "read_layout"]

STREAM = "stream"

Layout: TypeAlias = list[tuple[str, torch.dtype, list[int]]]
"""Name, dtype and shape of each tensor, in order."""


def layout_notes(tensors: Tensors) -> Notes:
    """Notes ``names``, ``shapes`` and, as in `pack_dtypes`, ``dtypes`` and ``each``."""
    return {
        "names": list(tensors),
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        **pack_dtypes([tensor.dtype for tensor in tensors.values()]),
    }


def read_layout(stage: str, notes: Notes, more: Mapping[str, type] | None = None) -> Layout:
    """Undo `layout_notes`; ``more`` are the fields that the stage has besides.

    Raises:
        PayloadError: a field is missing, unknown or malformed.
    """
    fields = {"names": list, "shapes": list, "dtypes": list, "each": str}
    check_notes(stage, notes, {**fields, **(more or {})})
    names, shapes = notes["names"], notes["shapes"]
    check_count(len(names), f"the layout of stage {stage!r}")
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise PayloadError(f"stage {stage!r}: the names are not text, or one stands there twice")
    if len(shapes) != len(names) or not all(is_shape(shape) for shape in shapes):
        raise PayloadError(f"stage {stage!r}: expected {len(names)} shapes, lists of sizes")
    dtypes = [dtype for dtype in unpack_dtypes(notes, len(names)) if dtype is not None]
    if len(dtypes) != len(names):
        raise PayloadError(f"stage {stage!r}: a tensor has no dtype")
    return list(zip(names, dtypes, shapes, strict=True))


def as_stream(parts: Sequence[bytes]) -> Tensors:
    """One uint8 tensor of its own memory."""
    data = bytearray().join(parts)
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return {STREAM: flat}


def one_stream(stage: str, tensors: Tensors) -> memoryview:
    """The bytes of the only tensor.

    Raises:
        PayloadError: there are others, or it is not a row of uint8.
    """
    stream = tensors.get(STREAM)
    if stream is None or len(tensors) != 1 or stream.dtype != torch.uint8 or stream.ndim != 1:
        raise PayloadError(
            f"stage {stage!r}: expected one uint8 tensor {STREAM!r} of one dimension, got "
            f"{[(name, tuple(t.shape), str(t.dtype)) for name, t in list(tensors.items())[:3]]}"
        )
    return tensor_bytes(stream)


def cut(plain: memoryview, layout: Layout) -> Tensors:
    """The tensors whose bytes stand one after the other in ``plain``, which is long enough.

    Raises:
        PayloadError: a shape that torch cannot make, or a boolean byte neither 0 nor 1.
    """
    decoded: Tensors = {}
    start = 0
    for name, dtype, shape in layout:
        size = byte_size(dtype, shape)
        decoded[name] = tensor_from_bytes(plain[start : start + size], dtype, shape, name=name)
        start += size
    return decoded
