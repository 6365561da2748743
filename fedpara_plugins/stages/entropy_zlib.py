"""Stage ``zlib``: all tensors as one deflate stream, losslessly, with the standard library."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.entropy_layout import (
    as_stream,
    cut,
    layout_notes,
    one_stream,
    read_layout,
)
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, byte_size, check_limit, tensor_bytes

__all__ = ["ZlibStage", "deflate", "inflate"]

# Measured on 1.5 M normal values as int8, one scale for each of 30 tensors (entropy 1.296 MB), zlib
# 1.2.13, one core: level 1 gives 1.318 MB at 47 MB/s, level 6 gives 1.310 MB at 44 MB/s, and Z_RLE
# with the most memory 1.305 MB at 123 MB/s. Such symbols have no repeated strings, only skewed
# frequencies and runs of zeros: searching for strings costs time and mixes the code tables. The
# same on float32 noise: 5.574, 5.557 and 5.547 of 6 MB at 38, 34 and 122 MB/s. Any zlib reads it.
_LEVEL, _MEMORY, _STRATEGY = 6, 9, zlib.Z_RLE
_HEAD = b"\x78\x9c"
"""What zlib itself writes in front of a stream of this level and window."""

# Most bytes of a float are noise (stage planes puts them together), and Huffman codes of noise take
# time and save nothing. VGG16's factors in planes: 24 ms and 5.28 MB where noise is stored, 45 ms
# and 5.39 MB where it is not.
_PIECE = 8192
"""Bytes that are judged together, and the fewest that are judged."""
_SAMPLED = 17
"""One byte in that many is looked at; odd, to meet every byte of wider values."""
_NOISE = 1.2
"""Noise has so many times the equal pairs of even frequencies at most; a code saves 1 % there."""


class ZlibStage(Stage):
    """The tensors' bytes one after the other, as one zlib stream in one uint8 tensor ``stream``.

    Notes: ``names``, ``shapes`` and, as in `pack_dtypes`, ``dtypes`` and ``each``.
    """

    name = "zlib"
    lossless = True
    entropy = True

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Compress."""
        parts = deflate(tensor_bytes(tensor) for tensor in tensors.values())
        return as_stream(parts), layout_notes(tensors)

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Decompress exactly the declared bytes.

        Raises:
            PayloadError: the layout is malformed or exceeds the limit, or the stream is damaged,
                shorter or longer than declared, or followed by other bytes.
        """
        layout = read_layout(self.name, notes)
        size = sum(byte_size(dtype, shape) for _, dtype, shape in layout)
        check_limit(size, limit, "the decompressed tensors")
        return cut(memoryview(inflate(self.name, one_stream(self.name, tensors), size)), layout)


def deflate(chunks: Iterable[memoryview | bytes]) -> list[bytes]:
    """One zlib stream, in parts; stretches of noise are stored as they are."""
    parts, checksum = [_HEAD], zlib.adler32(b"")
    noise, squeezer = False, _squeezer(noise=False)
    for chunk in chunks:
        for start in range(0, len(chunk), _PIECE):
            piece = chunk[start : start + _PIECE]
            if _is_noise(piece) != noise:
                parts.append(squeezer.flush(zlib.Z_FULL_FLUSH))  # whole bytes, and nothing open
                noise = not noise
                squeezer = _squeezer(noise=noise)
            parts.append(squeezer.compress(piece))
            checksum = zlib.adler32(piece, checksum)
    return [*parts, squeezer.flush(), checksum.to_bytes(4, "big")]


def _squeezer(*, noise: bool) -> zlib._Compress:
    # Without zlib's frame (the negative number): several of them write into one.
    level = 0 if noise else _LEVEL
    return zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, _MEMORY, _STRATEGY)


def _is_noise(piece: memoryview | bytes) -> bool:
    """Whether its bytes are about equally frequent, by the pairs of equal ones in a sample."""
    if len(piece) < _PIECE:
        return False
    sample = np.frombuffer(piece, np.uint8)[::_SAMPLED]
    counts = np.bincount(sample)
    even = len(sample) + len(sample) * (len(sample) - 1) / 256
    return int(counts @ counts) < _NOISE * even


def inflate(stage: str, stream: memoryview, size: int) -> bytes:
    """The ``size`` bytes of a zlib stream.

    Raises:
        PayloadError: it is damaged, holds more or fewer, or something follows it.
    """
    unpacker = zlib.decompressobj()
    try:
        # One byte more than declared, to see an excess without ever producing it.
        plain = unpacker.decompress(stream, size + 1)
    except zlib.error as error:
        raise PayloadError(f"stage {stage!r}: damaged stream: {error}") from error
    if len(plain) != size or not unpacker.eof or unpacker.unused_data:
        raise PayloadError(
            f"stage {stage!r}: expected a stream that ends after {size} bytes, got "
            f"{'more' if len(plain) > size else len(plain)}"
            f"{', bytes after its end' if unpacker.unused_data else ''}"
        )
    return plain
