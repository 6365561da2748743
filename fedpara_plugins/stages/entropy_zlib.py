"""Stage ``zlib``: all tensors as one zlib stream, lossless, written by the standard library."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.dtypes import tensor_bytes
from fedpara_plugins.stages.entropy_layout import (
    layout_notes,
    layout_size,
    read_layout,
    read_stream,
    read_tensors,
    stream_tensor,
)
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_limit

__all__ = ["Inflater", "ZlibStage", "deflate"]

# Measured on 1.5 M normal values as int8, one scale for each of 30 tensors (entropy 1.296 MB), zlib
# 1.2.13, one core: level 1 gives 1.318 MB at 47 MB/s, level 6 gives 1.310 MB at 44 MB/s, and Z_RLE
# with the most memory 1.305 MB at 123 MB/s. Such symbols have no repeated strings, only skewed
# frequencies and runs of zeros: searching for strings costs time and mixes the code tables. On
# float32 noise the same settings give 5.574, 5.557 and 5.547 of 6 MB at 38, 34 and 122 MB/s. Any
# zlib reads the result.
_LEVEL, _MEMORY, _STRATEGY = 6, 9, zlib.Z_RLE
_HEADER = b"\x78\x9c"
"""The header that zlib itself writes for this level and window."""

# Most bytes of a float are noise (stage planes puts them together), and Huffman codes of noise take
# time and save nothing. VGG16's factors in planes take 24 ms and 5.28 MB if noise is stored, 45 ms
# and 5.39 MB if it is not.
_BLOCK = 8192
"""Bytes that are tested for noise together; a shorter block is never noise."""
_SAMPLED = 17
"""One byte in 17 is sampled; the number is odd, to reach every byte of wider values."""
_NOISE = 1.2
"""Noise has at most this many times the equal pairs of a uniform distribution. At that bound, a
code would save 1 %."""
_PIECE, _PLAIN = 2**16, 2**18
"""Bytes that a decompressor gets and returns at a time, at most."""


class ZlibStage(Stage):
    """The bytes of all tensors, in order, as one zlib stream in the uint8 tensor ``stream``.

    Notes: ``names``, ``shapes`` and, as in `pack_dtypes`, ``dtypes`` and ``each``.
    """

    name = "zlib"
    lossless = True
    entropy = True
    owns_output = True

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Compress all tensors into one stream."""
        parts = deflate(tensor_bytes(tensor) for tensor in tensors.values())
        return stream_tensor(parts), layout_notes(tensors)

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Decompress exactly the declared bytes.

        Raises:
            PayloadError: the layout is malformed or exceeds the limit, or the stream is damaged,
                shorter or longer than declared, or followed by other bytes.
        """
        layout = read_layout(self.name, notes)
        size = layout_size(layout)
        check_limit(size, limit, "the decompressed tensors")
        source = Inflater(self.name, read_stream(self.name, tensors, size), size)
        decoded = read_tensors(source, layout)
        source.finish()
        return decoded


def deflate(chunks: Iterable[memoryview | bytes]) -> list[bytes]:
    """Return one zlib stream, in parts; blocks of noise are stored uncompressed."""
    parts, checksum = [_HEADER], zlib.adler32(b"")
    noise, compressor = False, _compressor(noise=False)
    for chunk in chunks:
        for start in range(0, len(chunk), _BLOCK):
            block = chunk[start : start + _BLOCK]
            if _is_noise(block) != noise:
                # The flush ends at a byte boundary, where another compressor can go on.
                parts.append(compressor.flush(zlib.Z_FULL_FLUSH))
                noise = not noise
                compressor = _compressor(noise=noise)
            parts.append(compressor.compress(block))
            checksum = zlib.adler32(block, checksum)
    return [*parts, compressor.flush(), checksum.to_bytes(4, "big")]


def _compressor(*, noise: bool) -> zlib._Compress:
    # The negative number leaves out zlib's header and checksum: several compressors share them.
    level = 0 if noise else _LEVEL
    return zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, _MEMORY, _STRATEGY)


def _is_noise(block: memoryview | bytes) -> bool:
    """Return whether the byte values of a block are about equally frequent."""
    if len(block) < _BLOCK:
        return False
    # In a sample, compare the number of equal pairs with that of a uniform distribution.
    sample = np.frombuffer(block, np.uint8)[::_SAMPLED]
    counts = np.bincount(sample)
    uniform = len(sample) + len(sample) * (len(sample) - 1) / 256
    return int(counts @ counts) < _NOISE * uniform


class Inflater:
    """Reads a zlib stream from its start to its end, in pieces.

    Args:
        stage: name of the stage, for messages.
        stream: the bytes.
        size: how many bytes it should hold.
    """

    def __init__(self, stage: str, stream: memoryview, size: int) -> None:
        self._stage = stage
        self._stream = stream
        self._size = size
        self._done = 0
        self._given = 0
        self._ready = memoryview(b"")
        self._decompressor = zlib.decompressobj()

    def read(self, size: int) -> bytearray:
        """Return the next ``size`` bytes.

        Raises:
            PayloadError: the stream is damaged, or ends before.
        """
        out = bytearray(size)
        self.read_into(memoryview(out))
        return out

    def read_into(self, out: memoryview) -> None:
        """Fill ``out`` with the next bytes.

        Raises:
            PayloadError: the stream is damaged, or ends before.
        """
        filled = 0
        while filled < len(out):
            part = self._ready[: len(out) - filled] or self._more()[: len(out) - filled]
            if not part:
                raise self._wrong(str(self._done + filled))
            out[filled : filled + len(part)] = part
            self._ready = self._ready[len(part) :]
            filled += len(part)
        self._done += filled

    def finish(self) -> None:
        """Check that the stream ends here, and nothing follows it.

        Raises:
            PayloadError: something does, or the stream is damaged.
        """
        if self._ready or self._more():
            raise self._wrong("more")
        # What was given in one piece with the end is known to follow it.
        if not self._decompressor.eof or self._decompressor.unused_data or self._left:
            after = ", bytes after its end" if self._decompressor.eof else ""
            raise self._wrong(f"{self._done}{after}")

    @property
    def _left(self) -> memoryview:
        return self._stream[self._given : self._given + 1]

    def _more(self) -> memoryview:
        """Decompress a piece, and return it; it is empty at the end of the stream."""
        while not self._ready and not self._decompressor.eof:
            piece: bytes | memoryview = self._decompressor.unconsumed_tail
            if not piece:
                piece = self._stream[self._given : self._given + _PIECE]
                self._given += len(piece)
            try:
                found = self._decompressor.decompress(piece, _PLAIN)
            except zlib.error as error:
                raise PayloadError(f"stage {self._stage!r}: damaged stream: {error}") from error
            if not found and not piece:
                break
            self._ready = memoryview(found)
        return self._ready

    def _wrong(self, got: str) -> PayloadError:
        return PayloadError(
            f"stage {self._stage!r}: expected a stream that ends after {self._size} bytes, got "
            f"{got}"
        )
