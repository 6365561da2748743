"""Stage ``ans``: integer symbols at their entropy with one common table, the rest by zlib."""

from __future__ import annotations

import numpy as np
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.ans_symbols import (
    EMPTY_HEADER,
    Counts,
    DecodedSymbols,
    Integers,
    count_symbols,
    decode_symbols,
    encode_symbols,
    read_header,
)
from fedpara_plugins.stages.dtypes import SYMBOL_DTYPES, byte_size, empty_tensor, tensor_bytes
from fedpara_plugins.stages.entropy_layout import (
    Layout,
    layout_notes,
    layout_size,
    read_layout,
    read_stream,
    read_tensors,
    stream_tensor,
)
from fedpara_plugins.stages.entropy_zlib import Inflater, deflate
from fedpara_plugins.stages.rans import lanes_for
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_limit

__all__ = ["AnsStage"]


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
    owns_output = True

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
        size = layout_size(layout)
        check_limit(size, limit, "the decompressed tensors")
        coded, others = _partition(layout, notes["coded"])
        decoded = _decode(read_stream(self.name, tensors, size), coded, others, limit)
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
    widest = max((dtype.itemsize for _, dtype, _ in coded), default=1)
    if count:
        sizes = [4 * lanes_for(count), 2 * (header.places + 1), widest * header.escapes]
    left = layout_size(others)
    # Escaped values have the widest type, which may be wider than most of their tensors.
    check_limit(sizes[2] + left, limit + limit // 16, "escaped values and plain bytes")
    source = Inflater("ans", stream[header.end_of_words :], sum(sizes) + left)
    words = stream[header.start_of_words : header.end_of_words]
    states, table = source.read(sizes[0]), source.read(sizes[1])
    found = DecodedSymbols(iter(()), None)
    if count:
        found = decode_symbols(header, words, states, table, count)
    symbols = _SymbolReader(found, source, header.escapes, widest)
    decoded = {entry[0]: symbols.tensor(entry) for entry in coded}
    symbols.finish()
    decoded |= read_tensors(source, others)
    source.finish()
    return decoded


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


class _SymbolReader:
    """Symbols as tensors, with escaped values in their places.

    Args:
        symbols: of all tensors, in parts.
        source: its next bytes are the escaped values.
        escapes: number of escaped values.
        width: bytes of each of them.
    """

    def __init__(self, symbols: DecodedSymbols, source: Inflater, escapes: int, width: int) -> None:
        self._parts, self._escape = symbols
        self._left: Integers = np.empty(0, np.int8)
        self._source = source
        self._escapes = escapes
        self._width = width
        self._used = 0

    def tensor(self, entry: tuple[str, torch.dtype, list[int]]) -> torch.Tensor:
        """Return the next tensor.

        Raises:
            PayloadError: torch cannot make the shape, a symbol does not fit the dtype, or the
                stream is damaged.
        """
        name, dtype, shape = entry
        tensor = empty_tensor(name, dtype, shape)
        values, done = tensor.view(-1).numpy(), 0
        while done < len(values):
            if not len(self._left):
                self._left = next(self._parts)
            part = self._left[: len(values) - done]
            self._left = self._left[len(part) :]
            self._write(name, part, values[done : done + len(part)])
            done += len(part)
        return tensor

    def finish(self) -> None:
        """Check that no symbols and no escaped values are left.

        Raises:
            PayloadError: some are.
        """
        for _ in self._parts:  # the words are checked behind the last symbol
            raise PayloadError("stage 'ans': symbols are left")
        if self._used != self._escapes:
            raise PayloadError(
                f"stage 'ans': {self._used} symbols escape, and {self._escapes} values are there"
            )

    def _write(self, name: str, symbols: Integers, into: Integers) -> None:
        if self._escape is None:
            _check_fits(name, symbols, into.dtype)
            into[:] = symbols
            return
        outside = np.flatnonzero(symbols == self._escape)
        left = self._escapes - self._used
        if left < len(outside):
            raise PayloadError(
                f"stage 'ans': at least {len(outside)} symbols of tensor {name!r} escape, and "
                f"{left} values are left"
            )
        if len(outside) == 0:
            _check_fits(name, symbols, into.dtype)
            into[:] = symbols
            return
        self._used += len(outside)
        far = np.frombuffer(self._source.read(self._width * len(outside)), f"<i{self._width}")
        if symbols.dtype.itemsize > into.dtype.itemsize:
            _check_fits(name, np.delete(symbols, outside), into.dtype)
        _check_fits(name, far, into.dtype)
        into[:] = symbols
        into[outside] = far


def _check_fits(name: str, values: Integers, kind: np.dtype[np.integer]) -> None:
    if not len(values) or values.dtype.itemsize <= kind.itemsize:
        return
    limits = np.iinfo(kind)
    if not limits.min <= values.min() <= values.max() <= limits.max:
        raise PayloadError(f"tensor {name!r}: a symbol does not fit torch.{kind}")
