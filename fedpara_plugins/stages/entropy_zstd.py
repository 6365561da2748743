"""Stage ``zstd``: all tensors as one Zstandard frame, if the library ``zstandard`` is installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fedpara_plugins.errors import ConfigError, MismatchError, PayloadError
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

__all__ = ["ZstdStage", "zstd_available"]

LEVEL = 1
_MISSING = (
    "codec stage 'zstd' needs the library zstandard, which this installation lacks: "
    "pip install 'fedpara-plugins[codecs]'"
)
MAX_WINDOW = 8 * 2**20
"""Most bytes of history that a frame may ask for; levels up to 19 ask for no more."""
# A block holds at most 128 KiB and takes at least a header of 3 bytes and one byte of content.
_MAX_GROWTH = 2**17 // 4


class ZstdStage(Stage):
    """The bytes of all tensors, in order, as one frame in the uint8 tensor ``stream``.

    Without bytes, the stream is empty. The frame (RFC 8878) declares its content's size, uses no
    dictionary and asks for at most 8 MiB of history. Notes as in `ZlibStage`.
    """

    name = "zstd"
    lossless = True
    entropy = True

    def with_options(self, options: Mapping[str, str]) -> Stage:
        """Return this stage, which has no options; called if a user chooses the stage by name.

        Raises:
            ConfigError: an option is given, or ``zstandard`` is not installed.
        """
        if not zstd_available():
            raise ConfigError(f"{_MISSING}, or choose 'entropy', which takes what both sides have")
        return super().with_options(options)

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Compress all tensors into one frame.

        Raises:
            MismatchError: ``zstandard`` is not installed.
        """
        library = _library()
        plain = b"".join([tensor_bytes(tensor) for tensor in tensors.values()])
        # A frame without content would hide what follows it, so there is none without bytes.
        packed = library.ZstdCompressor(level=LEVEL).compress(plain) if plain else b""
        return stream_tensor([packed]), layout_notes(tensors)

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Decompress exactly the declared bytes.

        Raises:
            MismatchError: ``zstandard`` is not installed.
            PayloadError: the layout is malformed or exceeds the limit, or the frame is damaged,
                of another size than declared, or followed by other bytes.
        """
        layout = read_layout(self.name, notes)
        size = layout_size(layout)
        check_limit(size, limit, "the decompressed tensors")
        plain = _decompress(read_stream(self.name, tensors), size)
        return split_bytes(memoryview(plain), layout)


def zstd_available() -> bool:
    """Return whether this installation can read and write the stage."""
    try:
        _library()
    except MismatchError:
        return False
    return True


def _library() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise MismatchError(f"{_MISSING}, or choose zlib or ans on the other side") from error


def _decompress(stream: memoryview, size: int) -> bytes:
    library = _library()
    if not size:
        if len(stream):
            raise PayloadError(f"stage 'zstd': expected no bytes, got a stream of {len(stream)}")
        return b""
    try:
        frame = library.get_frame_parameters(stream)
        # These determine what the library allocates, so they are checked before it does.
        if (frame.content_size, frame.dict_id) != (size, 0) or frame.window_size > MAX_WINDOW:
            raise PayloadError(
                f"stage 'zstd': expected a frame of {size} bytes, no dictionary and at most "
                f"{MAX_WINDOW} bytes of history, got {frame.content_size}, {frame.dict_id} and "
                f"{frame.window_size}"
            )
        if size > _MAX_GROWTH * len(stream):
            raise PayloadError(
                f"stage 'zstd': no frame of {len(stream)} bytes can hold the declared {size}"
            )
        decompressor = library.ZstdDecompressor(max_window_size=MAX_WINDOW)
        plain: bytes = decompressor.decompress(
            stream, max_output_size=size, read_across_frames=False, allow_extra_data=False
        )
    except library.ZstdError as error:
        raise PayloadError(f"stage 'zstd': damaged stream: {error}") from error
    if len(plain) != size:
        raise PayloadError(f"stage 'zstd': expected {size} bytes, got {len(plain)}")
    return plain
