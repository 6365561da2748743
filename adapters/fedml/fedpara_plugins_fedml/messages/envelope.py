"""One message between server and client: a JSON head and named payloads, as plain bytes.

    4 bytes   "FPE1"
    4 bytes   length of the head, little endian
    4 bytes   CRC-32 of the head
    the head  JSON: {"head": {...}, "payloads": [[name, size], ...]}
    payloads  one after the other

FedML's transports pickle their messages. The plugin's part of a message is these bytes, which are
read without pickle. docs/envelope.md describes the format. Each payload is decoded by the core's
strict decoder (docs/payload.md) afterwards. Nothing here imports FedML.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpara_plugins import MismatchError, PayloadError
from fedpara_plugins.codecs import strict_json

__all__ = ["Envelope", "pack", "unpack"]

MAGIC = b"FPE1"
FIXED = struct.Struct("<4sII")
MAX_HEAD = 2**20
MAX_PAYLOADS = 64
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
"""Pattern of a payload's name, under which a client also keeps it."""


@dataclass(frozen=True)
class Envelope:
    """The parts of a message.

    Attributes:
        head: plain JSON values.
        payloads: bytes by name.
    """

    head: Mapping[str, Any] = field(default_factory=dict)
    payloads: Mapping[str, bytes] = field(default_factory=dict)


def pack(head: Mapping[str, Any], payloads: Mapping[str, bytes]) -> bytes:
    """Return a message as bytes.

    Raises:
        PayloadError: if the head is not JSON or too large, or a payload's name does not match
            `NAME`.
    """
    if wrong := [name for name in payloads if not NAME.fullmatch(name)]:
        raise PayloadError(f"invalid name of a payload {wrong[0]!r}: expected {NAME.pattern}")
    sizes = [[name, len(data)] for name, data in payloads.items()]
    try:
        fields = {"head": dict(head), "payloads": sizes}
        text = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise PayloadError(f"the head of a message is not plain JSON: {error}") from error
    if len(text) > MAX_HEAD or len(payloads) > MAX_PAYLOADS:
        raise PayloadError(
            f"a message's head takes {len(text)} bytes and names {len(payloads)} payloads, more "
            f"than the {MAX_HEAD} and {MAX_PAYLOADS} that a receiver reads"
        )
    return b"".join([FIXED.pack(MAGIC, len(text), zlib.crc32(text)), text, *payloads.values()])


def unpack(data: object) -> Envelope:
    """Return the parts of a message; the sender is not trusted.

    Raises:
        MismatchError: if it is not a message of the plugin: the other side runs without it.
        PayloadError: if it is damaged.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise MismatchError(
            f"expected a message of fedpara-plugins, got a {type(data).__name__}: the other side "
            f"runs without the plugin, or with method and codec none. Give both the same "
            f"fedpara_* keys"
        )
    data = bytes(data)
    if len(data) < FIXED.size:
        raise PayloadError(f"a message of {len(data)} bytes is incomplete")
    magic, size, checksum = FIXED.unpack_from(data)
    if magic != MAGIC:
        raise MismatchError(f"a message begins with {magic!r}, expected {MAGIC!r}")
    if size > MAX_HEAD:
        raise PayloadError(f"the head of a message claims {size} bytes, the limit is {MAX_HEAD}")
    text = data[FIXED.size : FIXED.size + size]
    if len(text) != size or zlib.crc32(text) != checksum:
        raise PayloadError("the head of a message is damaged")
    try:
        fields = strict_json(text.decode())
    except UnicodeDecodeError as error:
        raise PayloadError(f"the head of a message is malformed: {error}") from error
    if not isinstance(fields, dict) or fields.keys() != {"head", "payloads"}:
        raise PayloadError("the head of a message is malformed: not an object of head and payloads")
    if not isinstance(fields["head"], dict):
        raise PayloadError("the head of a message is not a JSON object")
    return Envelope(fields["head"], _split(data, FIXED.size + size, fields["payloads"]))


def _split(data: bytes, start: int, sizes: Any) -> dict[str, bytes]:
    sound = isinstance(sizes, list) and len(sizes) <= MAX_PAYLOADS and all(map(_is_size, sizes))
    if not sound or len({name for name, _ in sizes}) != len(sizes):
        raise PayloadError("the head of a message lists its payloads in an invalid way")
    if start + sum(count for _, count in sizes) != len(data):
        raise PayloadError(
            f"a message of {len(data)} bytes does not have the size in its head: it was "
            f"truncated or extended on its way"
        )
    payloads = {}
    for name, count in sizes:
        payloads[name] = data[start : start + count]
        start += count
    return payloads


def _is_size(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    name, count = entry
    return (
        isinstance(name, str) and bool(NAME.fullmatch(name)) and type(count) is int and count >= 0
    )
