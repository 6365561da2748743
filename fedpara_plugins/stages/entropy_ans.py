"""Stage ``ans``: integer symbols at their entropy with one common table, the rest by zlib."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.ans_symbols import (
    EMPTY_HEADER,
    Counts,
    Integers,
    count_symbols,
    decode_symbols,
    encode_symbols,
    read_header,
)
from fedpara_plugins.stages.dtypes import SYMBOL_DTYPES, byte_size, tensor_bytes
from fedpara_plugins.stages.entropy_layout import (
    Layout,
    layout_notes,
    layout_size,
    read_layout,
    read_stream,
    split_bytes,
    stream_tensor,
)
from fedpara_plugins.stages.entropy_zlib import deflate, inflate
from fedpara_plugins.stages.rans import lanes_for
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_limit

__all__ = ["AnsStage"]

_CHUNK = 2**18
"""Symbols that are processed together."""


class AnsStage(Stage):
    """One uint8 tensor ``stream``: a header, words, and a zlib stream of everything else.

    Tensors of int8, int16 and int32 are coded by range ANS (`rans`), unless their plain
    bytes are fewer. Rare symbols and those far from zero escape: the table's last place stands for
    them, and zlib compresses their values. Notes as in `ZlibStage`, and ``coded``: a character for
    each tensor, ``s`` for symbols and ``-`` for all others.
    """

    name = "ans"
    lossless = True
    entropy = True

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Compress all tensors into one stream."""
        chosen, counts = _choose(tensors)
        coded = "".join("s" if name in chosen else "-" for name in tensors)
        notes = {**layout_notes(tensors), "coded": coded}
        rest = [tensor_bytes(tensor) for name, tensor in tensors.items() if name not in chosen]
        if not chosen:
            return stream_tensor([EMPTY_HEADER.packed, *deflate(rest)]), notes
        parts, plain = encode_symbols(np.concatenate(list(chosen.values())), counts)
        return stream_tensor([*parts, *deflate([plain, *rest])]), notes

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Decompress exactly the declared tensors.

        Raises:
            PayloadError: the layout is malformed or exceeds the limit, or the stream is damaged,
                shorter or longer than declared.
        """
        layout = read_layout(self.name, notes, {"coded": str})
        check_limit(layout_size(layout), limit, "the decompressed tensors")
        coded, others = _partition(layout, notes["coded"])
        decoded = _decode(read_stream(self.name, tensors), coded, others, limit)
        return {name: decoded[name] for name, _, _ in layout}


def _choose(tensors: Tensors) -> tuple[dict[str, Integers], Counts]:
    """Return the symbols of each tensor that costs less with the common table than as plain bytes.

    Returns:
        The symbols by tensor, and how often each of them occurs in all those tensors.
    """
    flat = {
        name: tensor.detach().cpu().reshape(-1).numpy()
        for name, tensor in tensors.items()
        if tensor.dtype in SYMBOL_DTYPES and tensor.numel()
    }
    if not flat:
        return {}, count_symbols(np.empty(0, np.int8))
    names = list(flat)
    counts = np.stack([count_symbols(values) for values in flat.values()])
    plain = 8 * np.array([values.itemsize for values in flat.values()], dtype=np.int64)
    for _ in range(2):  # the first table still counts tensors that turn out too expensive
        together = counts.sum(axis=0)
        bits = -np.log2((together + 0.5) / (together.sum() + 1))
        cheap = counts @ bits < plain * counts[:, :-1].sum(axis=1)
        names = [name for name, keep in zip(names, cheap, strict=True) if keep]
        counts, plain = counts[cheap], plain[cheap]
    return {name: flat[name] for name in names}, counts.sum(axis=0)


def _decode(stream: memoryview, coded: Layout, others: Layout, limit: int) -> Tensors:
    count = sum(_count(entry) for entry in coded)
    header = read_header(stream, count)
    sizes = [0, 0, 0]
    if count:
        widest = max(dtype.itemsize for _, dtype, _ in coded)
        sizes = [4 * lanes_for(count), 2 * (header.places + 1), widest * header.escapes]
    left = layout_size(others)
    # Escaped values have the widest type, which may be wider than most of their tensors.
    check_limit(sizes[2] + left, limit + limit // 16, "escaped values and plain bytes")
    plain = memoryview(inflate("ans", stream[header.end_of_words :], sum(sizes) + left))
    ends = list(accumulate(sizes))
    decoded = split_bytes(plain[ends[-1] :], others)
    if not count:
        return {**decoded, **split_bytes(memoryview(b""), coded)}
    states, table = plain[: ends[0]], plain[ends[0] : ends[1]]
    symbols, escape = decode_symbols(stream, states, table, count)
    escaped = np.frombuffer(plain[ends[1] : ends[2]], f"<i{widest}")
    return {**decoded, **_split_symbols(symbols, coded, escaped, escape)}


def _count(entry: tuple[str, torch.dtype, list[int]]) -> int:
    return byte_size(entry[1], entry[2]) // entry[1].itemsize


def _partition(layout: Layout, coded: str) -> tuple[Layout, Layout]:
    """Return the layout of the tensors that hold symbols, and that of all others."""
    if len(coded) != len(layout) or not set(coded) <= {"s", "-"}:
        raise PayloadError(f"stage 'ans': expected 's' or '-' for {len(layout)} tensors")
    parts: dict[str, Layout] = {"s": [], "-": []}
    for entry, letter in zip(layout, coded, strict=True):
        parts[letter].append(entry)
    wrong = [name for name, dtype, _ in parts["s"] if dtype not in SYMBOL_DTYPES]
    if wrong:
        raise PayloadError(f"stage 'ans': tensor {wrong[0]!r} cannot hold symbols")
    return parts["s"], parts["-"]


def _split_symbols(
    symbols: Integers, layout: Layout, escaped: Integers, escape: int | None
) -> Tensors:
    """Return the tensors, with the escaped values in place of the number ``escape``, if any."""
    decoded: Tensors = {}
    start = used = 0
    for entry in layout:
        name, dtype, shape = entry
        part = symbols[start : start + _count(entry)]
        start += len(part)
        values = np.empty(len(part), f"<i{dtype.itemsize}")
        used += _fill(name, values, part, escaped[used:], escape)
        try:
            decoded[name] = torch.from_numpy(values).reshape(shape)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise PayloadError(f"tensor {name!r}: cannot have this shape: {error}") from error
    if used != len(escaped):
        raise PayloadError(
            f"stage 'ans': {used} symbols escape, and {len(escaped)} values are there"
        )
    return decoded


def _fill(
    name: str, values: Integers, symbols: Integers, escaped: Integers, escape: int | None
) -> int:
    """Write one tensor's symbols and escaped values into ``values``; return how many escape."""
    if escape is None:
        _check_fits(name, symbols, values.dtype)
        values[:] = symbols
        return 0
    used = 0
    for start in range(0, len(values), _CHUNK):  # in chunks: masks and indices take memory
        chunk = symbols[start : start + _CHUNK]
        into = values[start : start + _CHUNK]
        outside = np.flatnonzero(chunk == escape)
        far = escaped[used : used + len(outside)]
        used += len(outside)
        if len(far) < len(outside):
            raise PayloadError(
                f"stage 'ans': at least {used} symbols of tensor {name!r} escape, and "
                f"{len(escaped)} values are left"
            )
        if chunk.dtype.itemsize > into.dtype.itemsize:
            near = np.delete(chunk, outside) if len(outside) else chunk
            _check_fits(name, near, into.dtype)
        _check_fits(name, far, into.dtype)
        into[:] = chunk
        into[outside] = far
    return used


def _check_fits(name: str, values: Integers, kind: np.dtype[np.integer]) -> None:
    if not len(values) or values.dtype.itemsize <= kind.itemsize:
        return
    limits = np.iinfo(kind)
    if not limits.min <= values.min() <= values.max() <= limits.max:
        raise PayloadError(f"tensor {name!r}: a symbol does not fit torch.{kind}")
