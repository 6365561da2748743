"""The container: a safetensors file with the payload's header in its metadata, and a checksum.

Nothing is ever unpickled, and every size is checked before memory of that size is allocated.
"""

from __future__ import annotations

import ctypes
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

from fedpara_plugins.codecs.json_reader import json_cost, strict_json
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.checks import check_dimensions, is_shape
from fedpara_plugins.stages.dtypes import DTYPES, byte_size, check_booleans, empty_tensor
from fedpara_plugins.stages.handed_over import HandedOver, working_limit
from fedpara_plugins.stages.stage import Tensors, check_count, check_limit

__all__ = [
    "CHECKSUM_BLANK",
    "Container",
    "check_body_size",
    "checked_cost",
    "checked_dtypes",
    "load_tensors",
    "open_container",
    "write_container",
]

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
    checked_dtypes(tensors)
    try:
        data = memoryview(safetensors.torch.save(tensors, metadata={_KEY: header}))
    except Exception as error:
        raise PayloadError(f"safetensors cannot write these tensors: {error!r}") from error
    size = _header_size(data)
    place = _checksum_place(data, size)
    digits = b"%08x" % _checksum(data, place)
    return b"".join((data[:place], digits, data[place + len(digits) :]))


def checked_dtypes(tensors: Tensors) -> None:
    """Raise unless a container can hold tensors of these dtypes.

    Raises:
        PayloadError: names the first that it cannot hold.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise PayloadError(
                f"tensor {name!r}: dtype {tensor.dtype} cannot be stored in a safetensors file by "
                "itself; use codec 'lossless', whose stream can hold it"
            )


class Container(NamedTuple):
    """A checked file.

    Attributes:
        header: the header's text.
        table: by tensor's name, what safetensors' header says of it.
        body: the tensors' bytes.
        cost: bytes of memory that the descriptions take, at most.
    """

    header: str
    table: Mapping[str, Any]
    body: memoryview
    cost: int


def open_container(data: bytes, limit: int | None) -> Container:
    """Check the container as a whole.

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
    check_body_size(len(view) - 8 - size, limit)
    place = _checksum_place(view, size)
    found, expected = bytes(view[place : place + 8]), b"%08x" % _checksum(view, place)
    if found != expected:
        raise PayloadError(
            f"damaged payload: checksum {expected.decode()}, header says {found!r}; send it again"
        )
    try:
        text = bytes(view[8 : 8 + size]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise PayloadError(f"the container's header is not UTF-8: {error}") from error
    cost = checked_cost(text, limit)
    outer = strict_json(text)
    metadata = outer.pop("__metadata__", None) if isinstance(outer, dict) else None
    header = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(header, str):
        raise PayloadError(f"the container has no metadata {_KEY!r}: not a payload")
    check_count(len(outer), "the container's table")
    # Escapes may hide from the first look what the text holds.
    return Container(header, outer, view[8 + size :], max(cost, checked_cost(header, limit)))


def checked_cost(text: str, limit: int | None) -> int:
    """Return the memory that the objects of a header's text take.

    Args:
        text: JSON.
        limit: bytes that the tensors may have; None for no limit.

    Raises:
        PayloadError: that is too much for the limit.
    """
    cost = json_cost(text)
    if limit is not None:
        check_limit(cost, working_limit(limit), "the objects of the payload's header")
    return cost


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


def check_body_size(size: int, limit: int | None) -> None:
    """Raise if the tensors' bytes are too many; incompressible data grows a little by zlib.

    Args:
        size: of the container's body.
        limit: bytes that the tensors may have; None for no limit.

    Raises:
        PayloadError: they are.
    """
    if limit is not None:
        check_limit(size, limit + limit // 64 + 1024, "the container's body")


def load_tensors(container: Container, order: Sequence[int] | None, *, working: int) -> HandedOver:
    """Return the tensors of a file, in the header's order.

    They lie in the file's own memory, which must not be written to, except for those at addresses
    where their dtype cannot be read.

    Args:
        container: the file.
        order: for each tensor, its place among the sorted names; None for the sorted order.
        working: bytes that decoding may take.

    Raises:
        PayloadError: the table does not fit the body, or the order does not fit the table.
    """
    names = sorted(container.table)
    if order is None:
        order = range(len(names))
    if sorted(order) != list(range(len(names))):
        raise PayloadError(f"the header's order is not one of {len(names)} tensors")
    places = _checked_places(container)
    loaded: Tensors = {}
    lent = set()
    body = _Borrowed(container.body)
    for place in order:
        name = names[place]
        tensor, borrowed = body.tensor(name, places[name])
        check_booleans(name, tensor)
        loaded[name] = tensor
        if borrowed:
            lent.add(tensor.untyped_storage().data_ptr())
    return HandedOver(loaded, lent=frozenset(lent), working=working)


class _Place(NamedTuple):
    """Where a tensor stands in the body."""

    dtype: torch.dtype
    shape: list[int]
    start: int
    end: int


def _checked_places(container: Container) -> dict[str, _Place]:
    """Return the place of each tensor.

    Raises:
        PayloadError: an entry is malformed, or entries overlap, leave gaps or lie outside.
    """
    places = {name: _place(name, entry) for name, entry in container.table.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
        if place.start != end:
            raise PayloadError(
                f"damaged container: tensor {name!r} begins at byte {place.start}, the one before "
                f"ends at {end}"
            )
        end = place.end
    if end != len(container.body):
        raise PayloadError(
            f"damaged container: {len(container.body)} bytes of tensors, the table has {end}"
        )
    return places


def _place(name: str, entry: object) -> _Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise PayloadError(f"damaged container: tensor {name!r} has no dtype, shape and offsets")
    dtype, shape, ends = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(shape, list):
        check_dimensions(name, len(shape))
    sound = is_shape(shape) and is_shape(ends) and len(ends) == 2 and isinstance(dtype, str)
    if not sound or dtype not in DTYPES:
        raise PayloadError(
            f"damaged container: tensor {name!r} has dtype {str(dtype)[:20]!r}, shape "
            f"{str(shape)[:60]} and offsets {str(ends)[:60]}"
        )
    place = _Place(DTYPES[dtype], shape, *ends)
    if place.end - place.start != byte_size(place.dtype, shape):
        raise PayloadError(
            f"damaged container: tensor {name!r} of {byte_size(place.dtype, shape)} bytes has "
            f"offsets {ends[0]} and {ends[1]}"
        )
    return place


class _Borrowed:
    """Bytes that torch may read where they lie.

    Args:
        data: stays alive as long as any of the tensors.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        if data.nbytes:
            self._address = np.frombuffer(data, np.uint8).ctypes.data
            # torch warns of memory that is not writable, which bytes are; nobody writes here.
            self._buffer = (ctypes.c_ubyte * data.nbytes).from_address(self._address)
            self._buffer.owner = data  # type: ignore[attr-defined]

    def tensor(self, name: str, place: _Place) -> tuple[torch.Tensor, bool]:
        """Return a tensor, and whether it lies in these bytes."""
        dtype, shape, start, end = place
        if start == end:
            return empty_tensor(name, dtype, shape), False
        if (self._address + start) % dtype.itemsize:
            own = bytearray(self._data[start:end])
            return torch.frombuffer(own, dtype=dtype).reshape(shape), False
        count = (end - start) // dtype.itemsize
        flat = torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=start)
        return flat.reshape(shape), True
