"""Stage ``ans``: integer symbols at their entropy, all of them with one table; the rest by zlib."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.entropy_layout import (
    Layout,
    as_stream,
    cut,
    layout_notes,
    one_stream,
    read_layout,
)
from fedpara_plugins.stages.entropy_zlib import deflate, inflate
from fedpara_plugins.stages.rans import PRECISION, lanes_for, pack, table_of, unpack
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, byte_size, check_limit, tensor_bytes

__all__ = ["AnsStage"]

_SYMBOL_DTYPES = (torch.int8, torch.int16, torch.int32)
_REACH = 1024
"""Symbols from -1024 to 1023 may have a place in the table; all others escape."""
_PART = 2**18
"""Symbols that are looked at together."""
_HEAD = struct.Struct("<iIII")  # lowest symbol, places, escapes, words

Integers = NDArray[np.integer]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class _Head:
    lowest: int
    places: int
    escapes: int
    words: int


class AnsStage(Stage):
    """One uint8 tensor ``stream``: head, words, and a zlib stream of all that is left.

    Tensors of int8, int16 and int32 are coded by `rans`, unless their plain bytes would be fewer.
    Symbols that are rare or far from zero escape: the table's last place stands for them, and
    their values are among what zlib packs. Notes as in `ZlibStage`, and ``coded``: a character for
    each tensor, ``s`` for symbols and ``-`` for others.
    """

    name = "ans"
    lossless = True
    entropy = True

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Compress."""
        chosen, counts = _choose(tensors)
        coded = "".join("s" if name in chosen else "-" for name in tensors)
        notes = {**layout_notes(tensors), "coded": coded}
        rest = [tensor_bytes(tensor) for name, tensor in tensors.items() if name not in chosen]
        if not chosen:
            return as_stream([_HEAD.pack(0, 0, 0, 0), *deflate(rest)]), notes
        parts, plain = _pack(np.concatenate(list(chosen.values())), counts)
        return as_stream([*parts, *deflate([plain, *rest])]), notes

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Decompress exactly the declared tensors.

        Raises:
            PayloadError: the layout is malformed or exceeds the limit, or the stream is damaged,
                shorter or longer than declared.
        """
        layout = read_layout(self.name, notes, {"coded": str})
        size = sum(byte_size(dtype, shape) for _, dtype, shape in layout)
        check_limit(size, limit, "the decompressed tensors")
        coded, others = _sides(layout, notes["coded"])
        decoded = _decode(one_stream(self.name, tensors), coded, others, limit)
        return {name: decoded[name] for name, _, _ in layout}


# --- choosing -----------------------------------------------------------------------------------


def _choose(tensors: Tensors) -> tuple[dict[str, Integers], Counts]:
    """The symbols of each tensor that costs less by the common table than as plain bytes.

    And how often each of them occurs in all those tensors, as `_count_into` has it.
    """
    flat = {
        name: tensor.detach().cpu().reshape(-1).numpy()
        for name, tensor in tensors.items()
        if tensor.dtype in _SYMBOL_DTYPES and tensor.numel()
    }
    names = list(flat)
    counts = np.zeros((len(flat), 2 * _REACH + 1), dtype=np.int64)
    for row, values in zip(counts, flat.values(), strict=True):
        _count_into(row, values)
    plain = 8 * np.array([values.itemsize for values in flat.values()], dtype=np.int64)
    for _ in range(2):  # the first table still holds what does not belong there
        together = counts.sum(axis=0)
        bits = -np.log2((together + 0.5) / (together.sum() + 1))
        cheap = counts @ bits < plain * counts[:, :-1].sum(axis=1)
        names = [name for name, keep in zip(names, cheap, strict=True) if keep]
        counts, plain = counts[cheap], plain[cheap]
    return {name: flat[name] for name in names}, counts.sum(axis=0)


def _count_into(row: Counts, values: Integers) -> None:
    """How often -1024 to 1023 occur, and at last how often anything else does."""
    if values.dtype == np.int8:
        # torch counts bytes without widening them first.
        octets = torch.bincount(torch.from_numpy(values.view(np.uint8)), minlength=256).numpy()
        row[_REACH : _REACH + 128] = octets[:128]
        row[_REACH - 128 : _REACH] = octets[128:]
        return
    places = values.astype(np.int64) + _REACH
    places[(places < 0) | (places > 2 * _REACH)] = 2 * _REACH
    row += np.bincount(places, minlength=len(row))


# --- symbols ------------------------------------------------------------------------------------


def _pack(values: Integers, counts: Counts) -> tuple[list[bytes], bytes]:
    """Head and words; and states, table and escaped values, for zlib."""
    # A place that would get less than half a slot takes more from the others than it saves.
    rare = counts[:-1] < counts.sum() >> (PRECISION + 1)
    escapes = int(counts[:-1][rare].sum() + counts[-1])
    kept = np.flatnonzero(counts[:-1] * ~rare)
    lowest, end = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (_REACH, _REACH)
    counts = np.append(np.where(rare, 0, counts[:-1])[lowest:end], escapes)
    lowest -= _REACH
    table = table_of(counts)
    keys, symbols = _keys(values)
    places = symbols - lowest
    outside = (places < 0) | (places >= len(table) - 1)
    outside |= table.take(places, mode="clip") == 0
    places[outside] = len(table) - 1
    escaped = values[np.flatnonzero(outside.take(keys))] if escapes else values[:0]
    states, words = pack(keys, places, table, lanes_for(len(values)))
    head = _HEAD.pack(lowest, len(table) - 1, len(escaped), len(words))
    plain = states.astype("<u4").tobytes() + table.astype("<u2").tobytes() + escaped.tobytes()
    return [head, words.astype("<u2").tobytes()], plain


def _keys(values: Integers) -> tuple[Integers, Counts]:
    """A small key for each value, and which symbol each key stands for; the ends stand for more."""
    if values.dtype == np.int8:
        return values.view(np.uint8), np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int64)
    ends = -_REACH - 1, _REACH
    keys = values.clip(*ends).astype(np.int16) - np.int16(ends[0])
    return keys, np.arange(ends[0], ends[1] + 1)


def _decode(stream: memoryview, coded: Layout, others: Layout, limit: int) -> Tensors:
    count = sum(_count(entry) for entry in coded)
    head = _read_head(stream, count)
    sizes = [0, 0, 0]
    if count:
        widest = max(dtype.itemsize for _, dtype, _ in coded)
        sizes = [4 * lanes_for(count), 2 * (head.places + 1), widest * head.escapes]
    left = sum(byte_size(dtype, shape) for _, dtype, shape in others)
    # Escaped values have the widest type, which may be wider than what most of them belong to.
    check_limit(sizes[2] + left, limit + limit // 16, "escaped values and plain bytes")
    plain = memoryview(inflate("ans", stream[_HEAD.size + 2 * head.words :], sum(sizes) + left))
    ends = list(accumulate(sizes))
    decoded = cut(plain[ends[-1] :], others)
    if not count:
        return {**decoded, **cut(memoryview(b""), coded)}
    states = np.frombuffer(plain[: ends[0]], "<u4")
    table = np.frombuffer(plain[ends[0] : ends[1]], "<u2").astype(np.int64)
    escaped = np.frombuffer(plain[ends[1] : ends[2]], f"<i{widest}")
    words = np.frombuffer(stream, "<u2", head.words, _HEAD.size)
    # The last place stands for an escape: a number that no other place stands for.
    escape = head.lowest + head.places
    narrow = head.lowest >= -128 and escape <= 127
    meanings = np.arange(head.lowest, escape + 1, dtype=np.int16)
    symbols = unpack(states, words, table, meanings.astype(np.int8) if narrow else meanings, count)
    possible = bool(head.escapes or table[-1])
    return {**decoded, **_cut_symbols(symbols, coded, escaped, escape if possible else None)}


def _read_head(stream: memoryview, count: int) -> _Head:
    if len(stream) < _HEAD.size:
        raise PayloadError(f"stage 'ans': a stream of {len(stream)} bytes is too short")
    head = _Head(*_HEAD.unpack_from(stream))
    sound = (
        head == _Head(0, 0, 0, 0)
        if count == 0
        else -_REACH <= head.lowest <= head.lowest + head.places <= _REACH
        and head.escapes <= count
        and _HEAD.size + 2 * head.words <= len(stream)
    )
    if not sound:
        raise PayloadError(
            f"stage 'ans': the stream of {len(stream)} bytes for {count} symbols begins with "
            f"{head}, which cannot be"
        )
    return head


# --- layout -------------------------------------------------------------------------------------


def _count(entry: tuple[str, torch.dtype, list[int]]) -> int:
    return byte_size(entry[1], entry[2]) // entry[1].itemsize


def _sides(layout: Layout, coded: str) -> tuple[Layout, Layout]:
    """Tensors of symbols, and the others."""
    if len(coded) != len(layout) or not set(coded) <= {"s", "-"}:
        raise PayloadError(f"stage 'ans': expected 's' or '-' for {len(layout)} tensors")
    sides: dict[str, Layout] = {"s": [], "-": []}
    for entry, side in zip(layout, coded, strict=True):
        sides[side].append(entry)
    wrong = [name for name, dtype, _ in sides["s"] if dtype not in _SYMBOL_DTYPES]
    if wrong:
        raise PayloadError(f"stage 'ans': tensor {wrong[0]!r} cannot be of symbols")
    return sides["s"], sides["-"]


def _cut_symbols(
    symbols: Integers, layout: Layout, escaped: Integers, escape: int | None
) -> Tensors:
    """The tensors; escaped values take the places of the number ``escape``, if there is one."""
    decoded: Tensors = {}
    start = taken = 0
    for entry in layout:
        name, dtype, shape = entry
        part = symbols[start : start + _count(entry)]
        start += len(part)
        values = np.empty(len(part), f"<i{dtype.itemsize}")
        taken += _fill(name, values, part, escaped[taken:], escape)
        try:
            decoded[name] = torch.from_numpy(values).reshape(shape)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise PayloadError(f"tensor {name!r}: cannot have this shape: {error}") from error
    if taken != len(escaped):
        raise PayloadError(
            f"stage 'ans': {taken} symbols escape, and {len(escaped)} values are there"
        )
    return decoded


def _fill(
    name: str, values: Integers, symbols: Integers, escaped: Integers, escape: int | None
) -> int:
    """Write what the symbols of one tensor stand for; how many of them escape."""
    if escape is None:
        _check_fits(name, symbols, values.dtype)
        values[:] = symbols
        return 0
    taken = 0
    for start in range(0, len(values), _PART):  # in parts: masks and places take memory
        part = symbols[start : start + _PART]
        into = values[start : start + _PART]
        outside = np.flatnonzero(part == escape)
        far = escaped[taken : taken + len(outside)]
        taken += len(outside)
        if len(far) < len(outside):
            raise PayloadError(
                f"stage 'ans': at least {taken} symbols of tensor {name!r} escape, and "
                f"{len(escaped)} values are left"
            )
        if part.dtype.itemsize > into.dtype.itemsize:
            near = np.delete(part, outside) if len(outside) else part
            _check_fits(name, near, into.dtype)
        _check_fits(name, far, into.dtype)
        into[:] = part
        into[outside] = far
    return taken


def _check_fits(name: str, values: Integers, kind: np.dtype[np.integer]) -> None:
    if not len(values) or values.dtype.itemsize <= kind.itemsize:
        return
    limits = np.iinfo(kind)
    if not limits.min <= values.min() <= values.max() <= limits.max:
        raise PayloadError(f"tensor {name!r}: a symbol does not fit torch.{kind}")
