"""Damaged messages with a valid checksum, as an attacker makes them, for tests and the fuzzer.

The checksum protects against accidents only. Nothing here imports FedML.
"""

from __future__ import annotations

import json
import random
import zlib
from typing import Any

from fedpara_plugins.testing import damaged as damaged_bytes
from fedpara_plugins_fedml.messages.envelope import FIXED, MAGIC

__all__ = ["damaged", "signed"]


def signed(data: bytes, *, sizes: bool = False) -> bytes:
    """Return a message with the right length and checksum of its head.

    Args:
        data: begins like a message; the length in it says where its head ends, if it can.
        sizes: whether the last payload's size is corrected too.
    """
    if len(data) < FIXED.size:
        return data
    _, size, _ = FIXED.unpack_from(data)
    text, body = data[FIXED.size : FIXED.size + size], data[FIXED.size + size :]
    if sizes:
        text = _with_sizes(text, body)
    return _joined(text, body)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return a message with damage in its head, in one of its payloads, or in any of its bytes.

    Args:
        data: the message.
        draw: source of the damage.
    """
    kind = draw.random()
    try:
        fields, payloads = _parts(data)
    except (ValueError, KeyError, TypeError, RecursionError):
        return signed(damaged_bytes(data, draw))
    if kind < 0.2 or (kind >= 0.65 and not payloads):
        whole = damaged_bytes(data, draw)
        return whole if draw.random() < 0.2 else signed(whole)
    if kind < 0.65:
        text = damaged_bytes(json.dumps(fields).encode(), draw)
        body = b"".join(payloads)
        return _joined(_with_sizes(text, body) if draw.random() < 0.5 else text, body)
    place = draw.randrange(len(payloads))
    payloads[place] = damaged_bytes(payloads[place], draw)
    fields["payloads"][place][1] = len(payloads[place])
    return _joined(json.dumps(fields).encode(), b"".join(payloads))


def _joined(text: bytes, body: bytes) -> bytes:
    return FIXED.pack(MAGIC, len(text), zlib.crc32(text)) + text + body


def _parts(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    if len(data) < FIXED.size:
        raise ValueError("no whole message")
    _, size, _ = FIXED.unpack_from(data)
    fields, place = json.loads(data[FIXED.size : FIXED.size + size]), FIXED.size + size
    payloads = []
    for _, count in fields["payloads"]:
        payloads.append(data[place : place + count])
        place += count
    return fields, payloads


def _with_sizes(text: bytes, body: bytes) -> bytes:
    try:
        fields = json.loads(text)
        *others, last = fields["payloads"]
        last[1] = len(body) - sum(count for _, count in others)
        return json.dumps(fields).encode()
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError):
        return text
