"""An entropy coder in integer arithmetic: interleaved range ANS (Duda, arXiv 1311.2540).

``docs/payload.md`` specifies the bits. Value i belongs to lane i mod L. Each lane is a coder of its
own with 32 bits of state; all lanes share one table and one sequence of 16-bit words. So a step
over all lanes takes a few numpy operations, and the same table gives the same bits on every
platform: no probability is ever a float.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import numpy as np
from numpy.typing import NDArray

from fedpara_plugins.errors import PayloadError

__all__ = ["MAX_LANES", "PRECISION", "frequency_table", "lanes_for", "pack", "unpack"]

PRECISION = 14
"""The frequencies in a table sum to two to the power of this."""
MAX_LANES = 4096
PART = 2**18
"""Most values that `unpack` returns at a time."""
_TOTAL = 1 << PRECISION
_LEAST = 1 << 16  # states are from this to 2**32 - 1; 16 bits move to or from the words at a time
_WORD = 16

Words = NDArray[np.uint16]
States = NDArray[np.uint32]
Table = NDArray[np.int64]


def frequency_table(counts: NDArray[np.int64]) -> Table:
    """Return frequencies in proportion to the counts, whose sum is 2**14.

    A frequency is at least 1 if its count is.

    Args:
        counts: of at most 2**14 symbols, not all zero.
    """
    used = counts > 0
    spare = _TOTAL - int(used.sum())
    table = counts * spare // int(counts.sum()) + used
    table[int(np.argmax(counts))] += _TOTAL - int(table.sum())
    return table


def lanes_for(count: int) -> int:
    """Return the number of lanes for ``count`` values, a power of two from 8 to `MAX_LANES`.

    It leads to 384 to 768 steps where the bounds allow: a lane costs 3 bytes, a step some 20 us.
    """
    lanes = 8
    while lanes < MAX_LANES and lanes * 768 < count:
        lanes *= 2
    return lanes


def pack(
    keys: NDArray[np.integer], places: NDArray[np.int64], table: Table, lanes: int
) -> tuple[States, Words]:
    """Encode keys into states and words.

    Args:
        keys: one small integer for each value.
        places: by key, its place in the table; the frequency there is not 0.
        table: from `frequency_table`.
        lanes: number of lanes.
    """
    starts = (np.cumsum(table) - table)[places]
    table = table[places]
    ceilings = table << (32 - PRECISION)
    complements = _TOTAL - table
    inverses = 1 / np.maximum(table, 1)
    states = np.full(lanes, _LEAST, dtype=np.int64)
    rows = -(-len(keys) // lanes)
    words: list[Words] = []
    for row in range(rows - 1, -1, -1):  # the row that is encoded last is decoded first
        key = keys[row * lanes : (row + 1) * lanes].astype(np.int64)
        state = states[: len(key)]
        full = np.flatnonzero(state >= ceilings.take(key))
        if len(full):
            spilled = state[full]
            words.append(spilled.astype(np.uint16))  # the low bits
            state[full] = spilled >> _WORD
        # Adding a half keeps the product 2**-15 away from every integer, and rounding errors stay
        # below 2**-19: its integer part is the exact quotient.
        quotient = ((state + 0.5) * inverses.take(key)).astype(np.int64)
        state += quotient * complements.take(key)  # = quotient * total + remainder
        state += starts.take(key)
    words.reverse()
    return states.astype(np.uint32), np.concatenate(words or [np.empty(0, np.uint16)])


def unpack(
    states: States, words: Words, table: Table, symbols: NDArray[np.integer], count: int
) -> Iterator[NDArray[np.integer]]:
    """Undo `pack`: yield exactly ``count`` values in parts, whatever the words are.

    Args:
        states: one for each lane.
        words: from `pack`.
        table: from `frequency_table`.
        symbols: by place in the table, the value to return for it.
        count: number of values.

    Yields:
        Entries of ``symbols``, in memory that the next part overwrites.

    Raises:
        PayloadError: the table is invalid, a state is out of range, or the words are not what
            `pack` makes of that many values; the last after all parts, if all others are sound.
    """
    if table.min(initial=0) < 0 or int(table.sum()) != _TOTAL:
        raise PayloadError(f"a table's frequencies sum to {int(table.sum())}, not {_TOTAL}")
    if not 0 < len(states) <= MAX_LANES or int(states.min()) < _LEAST:
        raise PayloadError(f"expected 1 to {MAX_LANES} states of at least {_LEAST}")
    state = states.astype(np.int64)
    if int(table.max()) == _TOTAL:
        # The only symbol leaves every state as it is, so that there is nothing to compute.
        yield from _same(symbols[int(table.argmax())], count)
        taken = 0
    else:
        taken = yield from _rows(state, words, table, symbols, count)
    if taken != len(words) or not bool((state == _LEAST).all()):
        raise PayloadError(f"{len(words)} words do not end where {count} values do: damaged")


def _same(symbol: np.integer, count: int) -> Iterator[NDArray[np.integer]]:
    part = np.full(min(count, PART), symbol)
    for start in range(0, count, PART):
        yield part[: count - start]


def _rows(
    state: NDArray[np.int64],
    words: Words,
    table: Table,
    symbols: NDArray[np.integer],
    count: int,
) -> Generator[NDArray[np.integer], None, int]:
    """Decode rows of one value for each lane, and return the number of words that they took."""
    lanes = len(state)
    # One look-up gives a slot's frequency (high bits) and its offset in the symbol (low bits).
    slots = np.arange(_TOTAL) - np.repeat(np.cumsum(table) - table, table)
    slots |= np.repeat(table, table) << _WORD
    values = np.repeat(symbols, table)
    found = np.empty(min(count, max(PART // lanes, 1) * lanes), dtype=symbols.dtype)
    taken = filled = 0
    for start in range(0, count, lanes):
        row = found[filled : filled + min(lanes, count - start)]
        part = state[: len(row)]
        slot = part & (_TOTAL - 1)
        values.take(slot, out=row, mode="clip")
        entry = slots.take(slot, mode="clip")
        part >>= PRECISION
        part *= entry >> _WORD
        part += entry & (_LEAST - 1)
        empty = np.flatnonzero(part < _LEAST)
        if len(empty):
            more = words[taken : taken + len(empty)]
            if len(more) < len(empty):
                raise PayloadError(f"the {len(words)} words end before {count} values do")
            part[empty] = part[empty] << _WORD | more
            taken += len(empty)
        filled += len(row)
        if filled == len(found) or start + lanes >= count:
            yield found[:filled]
            filled = 0
    return taken
