"""The payloads of a message's records as one: a single checksum, and headers packed together.

``docs/payload.md`` specifies the bytes. What comes out again are payloads of version 2, and each of
them is read as any other. Every size is checked before memory is allocated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

from fedpara_plugins.codecs.compact import (
    checked_parts,
    is_compact,
    joined_parts,
    longest_header,
)
from fedpara_plugins.codecs.description import DIGITS, LostDescriptionError
from fedpara_plugins.codecs.header_packing import deflate_text, inflate_text
from fedpara_plugins.codecs.json_reader import strict_json
from fedpara_plugins.codecs.roll import MOST_JOINED, NO_ROLL, Roll, RollRow
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.stage import MAX_TENSORS

__all__ = ["JOINT", "can_join", "join_payloads", "roll_of", "separate_payloads"]

JOINT = "payload3"
"""How a side says, among what it can decode, that it reads joint payloads."""

_MAGIC = b"FPP3"
_REFERENCE, _RUN, _STEPS, _SIZE = "\x0e", "\x10", "\x11", "\x12"
_RAW = re.compile(r"\x05([0-9]{1,9})\x06|([\x07\x0e\x11])")
_ROWS = re.compile(r'(?<="each":")[^"]*|(?<="scopes":")[^"]*|(?<="coded":")[^"]*')
_HASH_SIZE = 32
_MOST_MARKS = 128
"""Marks in a header; each takes time, and codecs write a dozen."""
_LONGEST_NAME = 256
_LONGEST_HEAD = 2**12
_LONGEST_NUMBER = 5
"""Bytes of a size, seven bits each."""


class _Entry(NamedTuple):
    """One record of a joint payload."""

    row: RollRow
    is_known: bool


def can_join(payloads: Mapping[str, bytes]) -> bool:
    """Return whether these payloads can travel as one: two to 64, all of version 2.

    Args:
        payloads: by name of the record.
    """
    return (
        1 < len(payloads) <= MOST_JOINED
        and all(map(is_compact, payloads.values()))
        and all(map(_is_name, payloads))
    )


def join_payloads(
    payloads: Mapping[str, bytes], *, roll: Roll, tensors: Mapping[str, int]
) -> bytes:
    """Return some payloads of version 2 as one.

    Args:
        payloads: by name of the record; see `can_join`.
        roll: that the receiver holds, one without rows for none.
        tensors: numbers of tensors, by record; they make repeated characters short, and may be any.
    """
    heads, texts, raws, bodies = [], [], [], []
    for (name, payload), row in zip_longest(payloads.items(), roll.rows[: len(payloads)]):
        packed, body, digest = checked_parts(payload, None)
        text, raw = inflate_text(packed, most=longest_header(None))
        known = _known(name, digest, row)
        count = row.tensors if known == "" else tensors[name]
        place = next((i for i, r in enumerate(roll.rows) if r.description == digest), None)
        if known is None and place is not None:
            heads.append(_json([name, place]))
            count = roll.rows[place].tensors
        else:
            heads.append(_json([name, digest, count]) if known is None else known)
        text, raw = _shortened(text, raw, row.reference if known == "" else None, count)
        texts.append(text.replace(f"[[{len(body)}]]", f"[[{_SIZE}]]"))
        raws.append(raw)
        bodies.append(body)
    lines = [line for pair in zip(heads, texts, strict=True) for line in pair]
    sizes = b"".join(_number(len(body)) for body in bodies[:-1])
    packed_all = deflate_text("\n".join(lines), sizes + b"".join(raws))
    digest = roll.digest if roll.rows else NO_ROLL
    return joined_parts(packed_all, digest, bodies, magic=_MAGIC)


def separate_payloads(
    data: bytes, *, rolls: Mapping[str, Roll], limit: int | None = None
) -> dict[str, bytes]:
    """Undo `join_payloads`; the sender is not trusted.

    Args:
        data: what may be a joint payload.
        rolls: those that this side holds, by hash.
        limit: bytes that the tensors of all records may have; None for no limit.

    Returns:
        Payloads of version 2 by name of the record, in the sender's order; nothing is known of them
        yet but that they stand there.

    Raises:
        LostDescriptionError: it refers to a roll that this side does not hold.
        PayloadError: not a joint payload, or a damaged one.
    """
    _check_magic(data)
    packed, body, digest = checked_parts(data, None)
    most = longest_header(limit)
    text, raw = inflate_text(packed, most=most)
    if text.count("\n") >= 2 * MOST_JOINED:
        raise PayloadError(f"the payload has more than the {MOST_JOINED} records that are read")
    lines = text.split("\n")
    if len(lines) % 2:
        raise PayloadError("the payload's records are damaged: a line is missing")
    entries = _entries(lines[::2], _held(digest, rolls))
    sizes, raw = _sizes(raw, len(entries), len(body))
    found: dict[str, bytes] = {}
    for entry, words, size in zip(entries, lines[1::2], sizes, strict=True):
        words, octets, raw = _lengthened(words, raw, entry, size, most)
        most -= len(words)
        if entry.row.name in found:
            raise PayloadError(f"the payload has record {entry.row.name[:80]!r} twice")
        header = deflate_text(words, octets, level=1)
        header += bytes(-(28 + len(header)) % 8)
        found[entry.row.name] = joined_parts(header, entry.row.description, [body[:size]])
        body = body[size:]
    if raw:
        raise PayloadError(f"the payload has {len(raw)} bytes that no record refers to")
    return found


def roll_of(data: bytes, rolls: Mapping[str, Roll]) -> Roll:
    """Return the roll that a joint payload refers to, one without rows for none.

    Args:
        data: what may be a joint payload.
        rolls: those that this side holds, by hash.

    Raises:
        LostDescriptionError: it is not held.
        PayloadError: not a joint payload, or a damaged one.
    """
    _check_magic(data)
    return _held(checked_parts(data, None)[2], rolls)


# Heads


def _check_magic(data: bytes) -> None:
    if bytes(data[:4]) != _MAGIC:
        raise PayloadError(f"not a joint payload: it begins with {bytes(data[:4])!r}")


def _known(name: str, digest: str, row: RollRow | None) -> str | None:
    """Return the head of a record whose name and description stand in the roll; None if not."""
    return "" if row is not None and (name, digest) == (row.name, row.description) else None


def _held(digest: str, rolls: Mapping[str, Roll]) -> Roll:
    if digest == NO_ROLL:
        return Roll(())
    if digest not in rolls:
        held = ", ".join(list(rolls)[-3:]) or "none"
        raise LostDescriptionError(
            f"the payload refers to roll {digest}, this side holds {held}; the sender must write "
            f"it whole"
        )
    return rolls[digest]


def _entries(heads: list[str], roll: Roll) -> list[_Entry]:
    return [_entry(place, head, roll) for place, head in enumerate(heads)]


def _entry(place: int, head: str, roll: Roll) -> _Entry:
    if not head and place < len(roll.rows):
        return _Entry(roll.rows[place], True)
    fields: Any = strict_json(head) if 0 < len(head) <= _LONGEST_HEAD else None
    row = _spelled(fields, roll) if isinstance(fields, list) else None
    if row is None:
        raise PayloadError(
            f"the payload's record {place} is named in an invalid way: {head[:80]!r}"
        )
    return _Entry(row, False)


def _spelled(fields: list[Any], roll: Roll) -> RollRow | None:
    """Return the row that a head writes out; None if it is none."""
    kinds = [type(field) for field in fields]
    if kinds[:1] != [str] or not _is_name(fields[0]):
        return None
    if kinds == [str, int] and 0 <= fields[1] < len(roll.rows):
        row = roll.rows[fields[1]]
        return RollRow(fields[0], row.description, row.reference, row.tensors)
    written = kinds == [str, str, int] and 0 <= fields[2] <= MAX_TENSORS
    if written and re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", fields[1]):
        return RollRow(fields[0], fields[1], "", fields[2])
    return None


def _is_name(name: str) -> bool:
    return len(name) <= _LONGEST_NAME and not any("\ud800" <= letter <= "\udfff" for letter in name)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


# Sizes


def _number(value: int) -> bytes:
    """Return a number, seven bits a byte, the lowest first; the last byte is below 128."""
    octets = bytearray()
    while value >= 128:
        octets.append(value % 128 + 128)
        value //= 128
    return bytes((*octets, value))


def _sizes(raw: bytes, count: int, total: int) -> tuple[list[int], bytes]:
    """Return the size of each record's body, and the raw bytes behind these numbers."""
    sizes, at = [], 0
    for _ in range(count - 1):
        value = shift = 0
        for octet in raw[at : at + _LONGEST_NUMBER]:
            at += 1
            value += (octet & 127) << shift
            shift += 7
            if octet < 128:
                break
        else:
            raise PayloadError("the payload's sizes are damaged")
        sizes.append(value)
    rest = total - sum(sizes)
    if rest < 0:
        raise PayloadError(f"the payload's records would have {total - rest} bytes of {total}")
    return [*sizes, rest], raw[at:]


# Texts


def _shortened(text: str, raw: bytes, reference: str | None, count: int) -> tuple[str, bytes]:
    """Return a header's text with marks for what the receiver knows, and the raw bytes left."""
    parts: list[bytes] = []
    place = 0
    known = None if reference is None else bytes.fromhex(reference)

    def mark(found: re.Match[str]) -> str:
        nonlocal place
        size = int(found[1]) if found[1] else _HASH_SIZE
        octets = raw[place : place + size]
        place += size
        if not found[1] and octets == known:
            return _REFERENCE
        parts.append(octets)
        return _STEPS if found[1] and size == 4 * count else found[0]

    def run(found: re.Match[str]) -> str:
        value = found[0]
        if count < 2 or len(value) < count or value[:count] != value[0] * count:
            return value
        return value[0] + _RUN + value[count:]

    text = _RAW.sub(mark, text)
    return _ROWS.sub(run, text), b"".join(parts)


def _lengthened(
    text: str, raw: bytes, entry: _Entry, size: int, most: int
) -> tuple[str, bytes, bytes]:
    """Return a header's text and raw bytes, and the raw bytes that belong to other records.

    Args:
        text: as received.
        raw: of this record and those behind it.
        entry: the record.
        size: of its body.
        most: characters that the text may have.
    """
    count = entry.row.tensors
    grown = text.count(_RUN) * count + text.count(_STEPS) * 16 + text.count(_SIZE) * 16
    if len(text) + grown > most:
        raise PayloadError(f"the payload's headers would have more than the {most} characters left")
    if _REFERENCE in text and not entry.is_known:
        raise PayloadError("the payload refers to a reference of a record that its roll lacks")
    if text.count(_RUN) + text.count(_SIZE) > _MOST_MARKS:
        raise PayloadError(f"the payload's header has more than {_MOST_MARKS} marks")
    text = re.sub(f"(.){_RUN}", lambda found: found[1] * count, text).replace(_SIZE, str(size))
    if sum(map(text.count, ("\x05", "\x07", _REFERENCE, _STEPS))) > _MOST_MARKS:
        raise PayloadError(f"the payload's header refers to more than {_MOST_MARKS} raw values")
    parts: list[bytes] = []
    place = 0

    def mark(found: re.Match[str]) -> str:
        nonlocal place
        if found[0] == _REFERENCE:
            parts.append(bytes.fromhex(entry.row.reference))
            return "\x07"
        wide = int(found[1]) if found[1] else _HASH_SIZE
        wide = 4 * count if found[0] == _STEPS else wide
        parts.append(raw[place : place + wide])
        place += wide
        return f"\x05{wide}\x06" if found[0] == _STEPS else found[0]

    text = _RAW.sub(mark, text)
    if place > len(raw):
        raise PayloadError("the payload's records refer to bytes that are missing")
    return text, b"".join(parts), raw[place:]
