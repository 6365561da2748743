"""The container: a safetensors file with the payload's header in its metadata, and a checksum.

Nothing is ever unpickled, and every size is checked before memory of that size is allocated.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch

from fedpara_plugins.codecs.json_reader import strict_json
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.checks import check_dimensions
from fedpara_plugins.stages.dtypes import DTYPES, check_booleans
from fedpara_plugins.stages.stage import Tensors, check_count, check_limit

__all__ = ["CHECKSUM_BLANK", "load_tensors", "open_container", "write_container"]

MAX_HEADER = 4 * 2**20
"""Most bytes of safetensors' header with the names of all tensors: enough for 20,000 tensors."""

_KEY = "fedpara"
# The start of the payload's header in the file, where it is a JSON string inside JSON.
_CHECKSUM_MARK = rb"{\"crc32\":\""
CHECKSUM_BLANK = "00000000"
"""Content of the header's field ``crc32`` until `write_container` knows the checksum."""
_BLANK = CHECKSUM_BLANK.encode()


def write_container(tensors: Tensors, header: str) -> bytes:
    """Return the file of these tensors and this header, with its checksum filled in.

    Args:
        tensors: by name.
        header: JSON text that begins with the field ``crc32``, whose value is `CHECKSUM_BLANK`.

    Raises:
        PayloadError: safetensors cannot write them, or the table would be too long to be read.
    """
    if "__metadata__" in tensors:
        raise PayloadError("a tensor cannot be called '__metadata__': safetensors reserves it")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise PayloadError(
                f"tensor {name!r}: dtype {tensor.dtype} cannot be stored in a safetensors file by "
                "itself; use codec 'lossless', whose stream can hold it"
            )
    try:
        data = memoryview(safetensors.torch.save(tensors, metadata={_KEY: header}))
    except Exception as error:
        raise PayloadError(f"safetensors cannot write these tensors: {error!r}") from error
    size = _header_size(data)
    place = _checksum_place(data, size)
    digits = b"%08x" % _checksum(data, place)
    return b"".join((data[:place], digits, data[place + len(digits) :]))


def open_container(data: bytes, limit: int | None) -> tuple[str, bytes]:
    """Check the container as a whole, and return the header's text and the file's bytes.

    Args:
        data: what may be a payload.
        limit: bytes that the tensors may have; None for no limit.

    Raises:
        PayloadError: not a payload, a damaged one, or one of more bytes than the limit allows.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise PayloadError(f"expected bytes, got {type(data).__name__}")
    view = memoryview(data).cast("B")
    size = _header_size(view)
    if limit is not None:
        check_limit(len(view) - 8 - size, _container_limit(limit), "the container's body")
    place = _checksum_place(view, size)
    found, expected = bytes(view[place : place + 8]), b"%08x" % _checksum(view, place)
    if found != expected:
        raise PayloadError(
            f"damaged payload: checksum {expected.decode()}, header says {found!r}; send it again"
        )
    try:
        outer = strict_json(bytes(view[8 : 8 + size]).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PayloadError(f"the container's header is not UTF-8: {error}") from error
    metadata = outer.get("__metadata__") if isinstance(outer, dict) else None
    _check_table(outer if isinstance(outer, dict) else {})
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise PayloadError(f"the container has no metadata {_KEY!r}: not a payload")
    return text, data if isinstance(data, bytes) else bytes(view)


def _check_table(table: Mapping[str, Any]) -> None:
    """Bound the numbers of tensors and dimensions; safetensors itself checks the rest."""
    check_count(len(table) - 1, "the container's table")
    for name, entry in table.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list):
            check_dimensions(name, len(shape))


def _header_size(data: memoryview) -> int:
    size = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else -1
    if not 0 < size <= min(len(data) - 8, MAX_HEADER):
        raise PayloadError(
            f"not a payload: {len(data)} bytes whose header would have {size}; expected a "
            f"safetensors file with a header of at most {MAX_HEADER} bytes"
        )
    return int(size)


def _checksum_place(data: memoryview, header_size: int) -> int:
    start = bytes(data[8 : 8 + header_size]).find(_CHECKSUM_MARK)
    place = 8 + start + len(_CHECKSUM_MARK)
    if start < 0 or place + len(_BLANK) > 8 + header_size:
        raise PayloadError("not a payload: no header of fedpara-plugins in the file's metadata")
    return place


def _checksum(data: memoryview, place: int) -> int:
    """Return the CRC-32 of the whole file, with zeros in place of the checksum's own digits."""
    before = zlib.crc32(data[:place])
    return zlib.crc32(data[place + 8 :], zlib.crc32(_BLANK, before))


def _container_limit(limit: int) -> int:
    """Return the most bytes of the container's body; incompressible data grows a little by zlib."""
    return limit + limit // 64 + 1024


def load_tensors(data: bytes, order: Sequence[int] | None) -> Tensors:
    """Return the tensors of a file that `open_container` has checked, in the header's order.

    Args:
        data: the file's bytes.
        order: for each tensor, its place among the sorted names; None for the sorted order.

    Raises:
        PayloadError: the table does not fit the body, or the order does not fit the table.
    """
    try:
        # safetensors checks offsets, overlaps, gaps and sizes, and copies each tensor once.
        loaded = safetensors.torch.load(data)
    except Exception as error:
        raise PayloadError(f"damaged container: {error!r}") from error
    for name, tensor in loaded.items():
        check_booleans(name, tensor)
    names = sorted(loaded)
    if order is None:
        order = range(len(names))
    if sorted(order) != list(range(len(names))):
        raise PayloadError(f"the header's order is not one of {len(names)} tensors")
    return {names[place]: loaded[names[place]] for place in order}
