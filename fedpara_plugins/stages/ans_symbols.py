"""The symbols of stage ``ans`` as bytes: which of them the table holds, and which escape."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.rans import PRECISION, frequency_table, lanes_for, pack, unpack

__all__ = [
    "EMPTY_HEADER",
    "Counts",
    "DecodedSymbols",
    "Integers",
    "StreamHeader",
    "count_symbols",
    "decode_symbols",
    "encode_symbols",
    "read_header",
]

LARGEST = 1024
"""Symbols from -1024 to 1023 may have a place in the table; all others escape."""

Integers = NDArray[np.integer]
Counts = NDArray[np.int64]
"""How often each symbol from -1024 to 1023 occurs, and last how often all others do."""


class StreamHeader(NamedTuple):
    """The first 16 bytes of the stream.

    Attributes:
        lowest: symbol at the table's first place.
        places: number of symbols in the table; one more place stands for escapes.
        escapes: number of values that escape.
        words: number of 16-bit words after the header.
    """

    lowest: int
    places: int
    escapes: int
    words: int

    @property
    def packed(self) -> bytes:
        """The header's bytes."""
        return _LAYOUT.pack(*self)

    @property
    def end_of_words(self) -> int:
        """Position in the stream after the words."""
        return self.start_of_words + 2 * self.words

    @property
    def start_of_words(self) -> int:
        """Position in the stream before the words."""
        return _LAYOUT.size


_LAYOUT = struct.Struct("<iIII")
EMPTY_HEADER = StreamHeader(0, 0, 0, 0)
"""The header of a stream without symbols."""


def count_symbols(values: Integers) -> Counts:
    """Return how often each symbol occurs."""
    counts = np.zeros(2 * LARGEST + 1, dtype=np.int64)
    if values.dtype == np.int8:
        # torch counts bytes without widening them first.
        octets = torch.bincount(torch.from_numpy(values.view(np.uint8)), minlength=256).numpy()
        counts[LARGEST : LARGEST + 128] = octets[:128]
        counts[LARGEST - 128 : LARGEST] = octets[128:]
        return counts
    places = values.astype(np.int64) + LARGEST
    places[(places < 0) | (places > 2 * LARGEST)] = 2 * LARGEST
    return np.bincount(places, minlength=len(counts))


def encode_symbols(values: Integers, counts: Counts) -> tuple[list[bytes], bytes]:
    """Encode symbols with one table.

    Args:
        values: the symbols of all tensors.
        counts: from `count_symbols`, of all of them.

    Returns:
        Header and words; and the bytes for zlib: states, table and escaped values.
    """
    # A symbol with less than half a slot would take more from the others than its place saves.
    rare = counts[:-1] < counts.sum() >> (PRECISION + 1)
    escapes = int(counts[:-1][rare].sum() + counts[-1])
    kept = np.flatnonzero(counts[:-1] * ~rare)
    lowest, end = (int(kept[0]), int(kept[-1]) + 1) if len(kept) else (LARGEST, LARGEST)
    counts = np.append(np.where(rare, 0, counts[:-1])[lowest:end], escapes)
    lowest -= LARGEST
    table = frequency_table(counts)
    keys, symbols = _keys(values)
    places = symbols - lowest
    outside = (places < 0) | (places >= len(table) - 1)
    outside |= table.take(places, mode="clip") == 0
    places[outside] = len(table) - 1
    escaped = values[np.flatnonzero(outside.take(keys))] if escapes else values[:0]
    states, words = pack(keys, places, table, lanes_for(len(values)))
    header = StreamHeader(lowest, len(table) - 1, len(escaped), len(words))
    plain = states.astype("<u4").tobytes() + table.astype("<u2").tobytes() + escaped.tobytes()
    return [header.packed, words.astype("<u2").tobytes()], plain


def _keys(values: Integers) -> tuple[Integers, Counts]:
    """Return a small key for each value, and by key the symbol that it stands for.

    The first and the last key of wider values stand for all symbols beyond the table's.
    """
    if values.dtype == np.int8:
        return values.view(np.uint8), np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int64)
    ends = -LARGEST - 1, LARGEST
    keys = values.clip(*ends).astype(np.int16) - np.int16(ends[0])
    return keys, np.arange(ends[0], ends[1] + 1)


def read_header(stream: memoryview, count: int) -> StreamHeader:
    """Return the header of a stream of ``count`` symbols.

    Raises:
        PayloadError: the stream is too short, or its header does not fit it.
    """
    if len(stream) < _LAYOUT.size:
        raise PayloadError(f"stage 'ans': a stream of {len(stream)} bytes is too short")
    header = StreamHeader(*_LAYOUT.unpack_from(stream))
    sound = (
        header == EMPTY_HEADER
        if count == 0
        else -LARGEST <= header.lowest <= header.lowest + header.places <= LARGEST
        and header.escapes <= count
        and header.end_of_words <= len(stream)
    )
    if not sound:
        raise PayloadError(
            f"stage 'ans': the stream of {len(stream)} bytes for {count} symbols has a header that "
            f"does not fit: {header}"
        )
    return header


class DecodedSymbols(NamedTuple):
    """Symbols in parts, and the number among them that stands for an escaped value, if any."""

    parts: Iterator[Integers]
    escape: int | None


def decode_symbols(
    header: StreamHeader, words: memoryview, states: bytearray, table: bytearray, count: int
) -> DecodedSymbols:
    """Undo `encode_symbols`, but for the escaped values.

    Args:
        header: from `read_header`.
        words: bytes of the words.
        states: bytes of the states.
        table: bytes of the frequencies.
        count: number of symbols.

    Raises:
        PayloadError: the table or a state is invalid, or the words do not fit; while the parts are
            read.
    """
    frequencies = np.frombuffer(table, "<u2").astype(np.int64)
    # The last place stands for an escape: it gets a number that no other place stands for.
    escape = header.lowest + header.places
    narrow = header.lowest >= -128 and escape <= 127
    meanings: Integers = np.arange(header.lowest, escape + 1, dtype=np.int16)
    meanings = meanings.astype(np.int8) if narrow else meanings
    parts = unpack(
        np.frombuffer(states, "<u4"), np.frombuffer(words, "<u2"), frequencies, meanings, count
    )
    return DecodedSymbols(parts, escape if header.escapes or frequencies[-1] else None)
