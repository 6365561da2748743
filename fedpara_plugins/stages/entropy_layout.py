"""Common parts of the entropy stages: tensors as one stream of bytes, and notes of its layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.checks import is_shape
from fedpara_plugins.stages.dtypes import (
    byte_size,
    check_booleans,
    empty_tensor,
    pack_dtypes,
    tensor_bytes,
    unpack_dtypes,
)
from fedpara_plugins.stages.stage import Notes, Tensors, check_count, check_notes

__all__ = [
    "STREAM",
    "ByteSource",
    "Layout",
    "layout_notes",
    "layout_size",
    "read_layout",
    "read_stream",
    "read_tensors",
    "stream_tensor",
]

STREAM = "stream"
_SMALL = 2**16
"""Bytes from which on torch allocates a tensor: it does not touch the memory, but takes longer."""
_SPARE = 2**16
"""Bytes that a stream may have beyond a 65th more than what it stands for: tables, checksums."""

Layout: TypeAlias = list[tuple[str, torch.dtype, list[int]]]
"""Name, dtype and shape of each tensor, in order."""


def layout_notes(tensors: Tensors) -> Notes:
    """Return the notes ``names``, ``shapes`` and, as in `pack_dtypes`, ``dtypes`` and ``each``."""
    return {
        "names": list(tensors),
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        **pack_dtypes([tensor.dtype for tensor in tensors.values()]),
    }


def read_layout(stage: str, notes: Notes, more: Mapping[str, type] | None = None) -> Layout:
    """Undo `layout_notes`.

    Args:
        stage: the stage's name, for messages.
        notes: as received.
        more: the stage's other notes, by name, with their types.

    Raises:
        PayloadError: a field is missing, unknown or malformed.
    """
    fields = {"names": list, "shapes": list, "dtypes": list, "each": str}
    check_notes(stage, notes, {**fields, **(more or {})})
    names, shapes = notes["names"], notes["shapes"]
    check_count(len(names), f"the layout of stage {stage!r}")
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise PayloadError(f"stage {stage!r}: the names are not text, or one is repeated")
    if len(shapes) != len(names) or not all(is_shape(shape) for shape in shapes):
        raise PayloadError(f"stage {stage!r}: expected {len(names)} shapes, lists of sizes")
    dtypes = [dtype for dtype in unpack_dtypes(notes, len(names)) if dtype is not None]
    if len(dtypes) != len(names):
        raise PayloadError(f"stage {stage!r}: a tensor has no dtype")
    return list(zip(names, dtypes, shapes, strict=True))


def layout_size(layout: Layout) -> int:
    """Return the bytes of all tensors of a layout."""
    return sum(byte_size(dtype, shape) for _, dtype, shape in layout)


def stream_tensor(parts: Sequence[bytes]) -> Tensors:
    """Return the joined bytes as the one uint8 tensor `STREAM`."""
    data = bytearray().join(parts)
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return {STREAM: flat}


def read_stream(stage: str, tensors: Tensors, size: int) -> memoryview:
    """Return the bytes of the one tensor `STREAM`.

    Args:
        stage: the stage's name, for messages.
        tensors: as received.
        size: bytes that the layout declares.

    Raises:
        PayloadError: there are other tensors, it is not uint8 of one dimension, or it is much
            longer than what it stands for.
    """
    stream = tensors.get(STREAM)
    if stream is None or len(tensors) != 1 or stream.dtype != torch.uint8 or stream.ndim != 1:
        raise PayloadError(
            f"stage {stage!r}: expected one uint8 tensor {STREAM!r} of one dimension, got "
            f"{[(name, tuple(t.shape), str(t.dtype)) for name, t in list(tensors.items())[:3]]}"
        )
    # Without this bound, reading a stream that yields nothing would take as long as it likes.
    most = size + size // 64 + _SPARE
    if len(stream) > most:
        raise PayloadError(
            f"stage {stage!r}: a stream of {len(stream)} bytes for tensors of {size}, at most "
            f"{most} are read"
        )
    return tensor_bytes(stream)


class ByteSource(Protocol):
    """What a stream holds, read from its start to its end."""

    def read_into(self, out: memoryview) -> None:
        """Fill ``out`` with the next bytes.

        Raises:
            PayloadError: the stream is damaged, or ends before.
        """

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            PayloadError: something is.
        """


def read_tensors(source: ByteSource, layout: Layout) -> Tensors:
    """Return the tensors of a layout from their adjacent bytes, each with memory of its own.

    Args:
        source: of the bytes.
        layout: of the tensors.

    Raises:
        PayloadError: torch cannot make a shape, a boolean byte is neither 0 nor 1, or the source
            is damaged.
    """
    decoded: Tensors = {}
    sizes = [byte_size(dtype, shape) for _, dtype, shape in layout]
    block, used = bytearray(), 0
    for place, (name, dtype, shape) in enumerate(layout):
        size = sizes[place]
        if 0 < size < _SMALL:
            if used == len(block):
                block, used = _next_block(source, sizes, place), 0
            tensor = torch.frombuffer(block[used : used + size], dtype=dtype)
            tensor = tensor if len(shape) == 1 else tensor.reshape(shape)
            used += size
        else:
            tensor = empty_tensor(name, dtype, shape)
            if size:
                source.read_into(tensor_bytes(tensor))
        check_booleans(name, tensor)
        decoded[name] = tensor
    return decoded


def _next_block(source: ByteSource, sizes: Sequence[int], place: int) -> bytearray:
    """Return the bytes of as many small tensors as are read together, from one on."""
    total = sizes[place]
    for following in range(place + 1, len(sizes)):
        size = sizes[following]
        if size >= _SMALL or total + size > _SMALL:
            break
        total += size
    block = bytearray(total)
    source.read_into(memoryview(block))
    return block
