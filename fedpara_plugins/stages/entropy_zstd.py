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
    read_tensors,
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
    owns_output = True

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
        source = _Frame(read_stream(self.name, tensors, size), size)
        decoded = read_tensors(source, layout)
        source.finish()
        return decoded


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


class _Frame:
    """Reads the content of a frame from its start to its end.

    Args:
        stream: the frame; empty if there is no content.
        size: how many bytes it should hold.

    Raises:
        PayloadError: the frame declares another size, a dictionary or too much history, or its
            blocks do not end with the stream.
    """

    def __init__(self, stream: memoryview, size: int) -> None:
        self._library = _library()
        self._size = size
        self._reader: Any = None
        if not size:
            if len(stream):
                raise PayloadError(
                    f"stage 'zstd': expected no bytes, got a stream of {len(stream)}"
                )
            return
        try:
            frame = self._library.get_frame_parameters(stream)
            start = self._library.frame_header_size(stream)
        except self._library.ZstdError as error:
            raise _damaged(error) from error
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
        # The library's reader tells neither a frame that is cut off nor what follows it.
        end = _end_of_blocks(stream, start) + 4 * frame.has_checksum
        if end != len(stream):
            raise PayloadError(
                f"stage 'zstd': damaged stream: its frame has {end} bytes, got {len(stream)}"
            )
        decompressor = self._library.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._reader = decompressor.stream_reader(stream, read_across_frames=False)

    def read_into(self, out: memoryview) -> None:
        """Fill ``out`` with the next bytes.

        Raises:
            PayloadError: the frame is damaged, or ends before.
        """
        filled = 0
        while filled < len(out):
            try:
                count = self._reader.readinto(out[filled:])
            except self._library.ZstdError as error:
                raise _damaged(error) from error
            if not count:
                raise PayloadError(f"stage 'zstd': expected {self._size} bytes, got fewer")
            filled += count

    def finish(self) -> None:
        """Check that the frame ends here.

        Raises:
            PayloadError: it does not, or its checksum is wrong.
        """
        if self._reader is None:
            return
        try:
            more = self._reader.read(1)
        except self._library.ZstdError as error:
            raise _damaged(error) from error
        if more:
            raise PayloadError(f"stage 'zstd': expected {self._size} bytes, got more")


def _damaged(error: Exception) -> PayloadError:
    return PayloadError(f"stage 'zstd': damaged stream: {error}")


def _end_of_blocks(stream: memoryview, start: int) -> int:
    """Return the position after a frame's last block (RFC 8878, 3.1.1.2).

    Raises:
        PayloadError: the stream ends before.
    """
    place = start
    while place + 3 <= len(stream):
        header = int.from_bytes(stream[place : place + 3], "little")
        repeated = header >> 1 & 3 == 1
        place += 3 + (1 if repeated else header >> 3)
        if header & 1:
            return place
    raise PayloadError("stage 'zstd': damaged stream: it ends before its last block")
