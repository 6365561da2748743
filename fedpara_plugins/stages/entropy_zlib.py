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
    split_bytes,
    stream_tensor,
)
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_limit

__all__ = ["ZlibStage", "deflate", "inflate"]

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


class ZlibStage(Stage):
    """The bytes of all tensors, in order, as one zlib stream in the uint8 tensor ``stream``.

    Notes: ``names``, ``shapes`` and, as in `pack_dtypes`, ``dtypes`` and ``each``.
    """

    name = "zlib"
    lossless = True
    entropy = True

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
        plain = inflate(self.name, read_stream(self.name, tensors), size)
        return split_bytes(memoryview(plain), layout)


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


def inflate(stage: str, stream: memoryview, size: int) -> bytes:
    """Return the ``size`` bytes of a zlib stream.

    Raises:
        PayloadError: the stream is damaged, holds more or fewer bytes, or something follows it.
    """
    decompressor = zlib.decompressobj()
    try:
        # One byte more than declared shows an excess without ever producing it.
        plain = decompressor.decompress(stream, size + 1)
    except zlib.error as error:
        raise PayloadError(f"stage {stage!r}: damaged stream: {error}") from error
    if len(plain) != size or not decompressor.eof or decompressor.unused_data:
        raise PayloadError(
            f"stage {stage!r}: expected a stream that ends after {size} bytes, got "
            f"{'more' if len(plain) > size else len(plain)}"
            f"{', bytes after its end' if decompressor.unused_data else ''}"
        )
    return plain
