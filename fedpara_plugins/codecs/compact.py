"""The container of version 2: a header that is compressed and refers to a shared description.

The tensors stand behind it, in the order of falling width. ``docs/payload.md`` specifies the bytes.
Every size is checked before memory of that size is allocated.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedpara_plugins.codecs.container import (
    Container,
    check_body_size,
    checked_cost,
    checked_dtypes,
)
from fedpara_plugins.codecs.description import (
    LONGEST_TEXT,
    UNKNOWN,
    Description,
    HeaderForm,
    held_description,
)
from fedpara_plugins.codecs.header import PayloadHeader, compact_header
from fedpara_plugins.codecs.header_packing import pack_text, unpack_text
from fedpara_plugins.codecs.json_reader import strict_json
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.dtypes import byte_size, dtype_name, tensor_bytes
from fedpara_plugins.stages.entropy_layout import Layout, layout_notes, read_layout
from fedpara_plugins.stages.handed_over import working_limit
from fedpara_plugins.stages.stage import Tensors

__all__ = [
    "MAGIC",
    "checked_parts",
    "is_compact",
    "joined_parts",
    "longest_header",
    "open_compact",
    "peek_compact",
    "write_compact",
]

MAGIC = b"FPP2"
"""As a length of safetensors' table, far beyond what version 1 allows."""

_FIXED = struct.Struct("<4sII16s")
_CHECKED = 8
"""Bytes before those that the checksum covers."""

_LAYOUT = ("names", "shapes", "dtypes", "each")
"""The header's fields that describe the tensors, as an entropy stage's notes do."""


def is_compact(data: object) -> bool:
    """Return whether bytes claim to be a payload of version 2."""
    return isinstance(data, bytes | bytearray | memoryview) and bytes(data[:4]) == MAGIC


def write_compact(coded: Tensors, fields: Mapping[str, Any], form: HeaderForm) -> bytes:
    """Return the file of these tensors and this header.

    Args:
        coded: the encoded tensors.
        fields: the header's fields, without those that describe the tensors.
        form: how the header is written.

    Raises:
        PayloadError: a tensor cannot be stored, the fields are not plain JSON, or the header would
            be too long to be read.
    """
    checked_dtypes(coded)
    # Only `model`, `extra` and notes come from elsewhere, and are refused here as a receiver would.
    try:
        text = json.dumps({**fields, **layout_notes(coded)}, separators=(",", ":"))
        _parsed(text, form.digest)
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(f"model and extra must be plain JSON objects: {error}") from error
    if len(text) > LONGEST_TEXT:
        raise PayloadError(
            f"the payload's header has {len(text)} characters, at most {LONGEST_TEXT} are read"
        )
    packed = pack_text(text, form.usable)
    # The tensors' bytes begin where the widest of them need not be copied to be read.
    widest = max((tensor.dtype.itemsize for tensor in coded.values()), default=1)
    packed += bytes(-(_FIXED.size + len(packed)) % widest)
    body = [tensor_bytes(coded[name]) for name in _in_file(list(coded), coded)]
    return joined_parts(packed, form.digest, body)


def joined_parts(
    packed: bytes, digest: str, body: Sequence[bytes | memoryview], *, magic: bytes = MAGIC
) -> bytes:
    """Return the file of a packed header and what follows it.

    Args:
        packed: the header.
        digest: the hash that stands before it.
        body: the bytes behind it.
        magic: the file's first four bytes.
    """
    parts = [struct.pack("<I16s", len(packed), bytes.fromhex(digest)), packed, *body]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join((magic, struct.pack("<I", checksum), *parts))


def open_compact(
    data: bytes, limit: int | None, descriptions: Mapping[str, Description] | None
) -> tuple[Container, PayloadHeader]:
    """Check a payload of version 2 as a whole, and read its header.

    Args:
        data: what may be a payload.
        limit: bytes that the tensors may have; None for no limit.
        descriptions: those that this side holds, by hash.

    Raises:
        LostDescriptionError: the header refers to another description.
        PayloadError: not a payload, a damaged one, or one of more bytes than the limit allows.
    """
    packed, body, digest = checked_parts(data, limit)
    text = unpack_text(packed, held_description(digest, descriptions), most=longest_header(limit))
    cost = checked_cost(text, limit)
    table, header = _parsed(text, digest)
    return Container(text, table, body, cost), header


def peek_compact(data: bytes, limit: int | None) -> PayloadHeader:
    """Return what a header says by itself, for a side that may lack its description.

    Where it refers to one, the model is None, notes lack names and shapes, and the order is None.

    Args:
        data: what may be a payload.
        limit: bytes that the tensors may have; None for no limit.

    Raises:
        PayloadError: not a payload, a damaged one, or one of more bytes than the limit allows.
    """
    packed, _, digest = checked_parts(data, limit)
    known = held_description(digest, {digest: UNKNOWN})
    text = unpack_text(packed, known, most=longest_header(limit))
    checked_cost(text, limit)
    if known is None:
        return _parsed(text, digest)[1]
    fields = strict_json(text)
    if not isinstance(fields, dict):
        raise PayloadError("the payload's header is not a JSON object")
    fields = {name: value for name, value in fields.items() if name not in _LAYOUT}
    return compact_header(fields, None, digest)


def checked_parts(data: bytes, limit: int | None) -> tuple[memoryview, memoryview, str]:
    """Return the packed header, the body and the hash of a file with a right checksum.

    Args:
        data: what may be a payload.
        limit: bytes that the tensors may have; None for no limit.

    Raises:
        PayloadError: not a payload, a damaged one, or one of more bytes than the limit allows.
    """
    view = memoryview(data).cast("B")
    size = _header_size(view)
    _, checksum, _, digest = _FIXED.unpack_from(view)
    body = view[_FIXED.size + size :]
    check_body_size(len(body), limit)
    found = zlib.crc32(view[_CHECKED:])
    if found != checksum:
        raise PayloadError(
            f"damaged payload: checksum {found:08x}, header says {checksum:08x}; send it again"
        )
    return view[_FIXED.size : _FIXED.size + size], body, digest.hex()


def longest_header(limit: int | None) -> int:
    """Return the most characters of a header; its objects take several times as many bytes.

    Args:
        limit: bytes that the tensors may have; None for no limit.
    """
    return LONGEST_TEXT if limit is None else min(LONGEST_TEXT, working_limit(limit) // 4)


def _parsed(text: str, digest: str) -> tuple[dict[str, Any], PayloadHeader]:
    """Return safetensors' table of the tensors, and the header.

    Raises:
        PayloadError: a field is missing, unknown or malformed.
    """
    fields = strict_json(text)
    if not isinstance(fields, dict):
        raise PayloadError("the payload's header is not a JSON object")
    layout = read_layout("table", {name: fields.pop(name, None) for name in _LAYOUT})
    table, order = _table(layout)
    return table, compact_header(fields, order, digest)


def _header_size(data: memoryview) -> int:
    size = _FIXED.unpack_from(data)[2] if len(data) >= _FIXED.size else -1
    if not 0 < size <= min(len(data) - _FIXED.size, LONGEST_TEXT):
        raise PayloadError(
            f"not a payload: {len(data)} bytes whose header would have {size}; expected a header "
            f"of at most {LONGEST_TEXT} bytes"
        )
    return int(size)


def _in_file(names: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names in the order of the file: wide values first, so that all are aligned."""
    return sorted(names, key=lambda name: -tensors[name].dtype.itemsize)


def _table(layout: Layout) -> tuple[dict[str, Any], list[int]]:
    """Return safetensors' table of these tensors, and the place of each among the sorted names."""
    table: dict[str, Any] = {}
    start = 0
    for name, dtype, shape in sorted(layout, key=lambda entry: -entry[1].itemsize):
        end = start + byte_size(dtype, shape)
        table[name] = {"dtype": dtype_name(dtype), "shape": shape, "data_offsets": [start, end]}
        start = end
    places = {name: place for place, name in enumerate(sorted(table))}
    return table, [places[name] for name, _, _ in layout]
