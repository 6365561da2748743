"""A ClientApp that notes what comes to it and what leaves it, outside of all mods."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

PAYLOAD = "fedpara.payload"


class NotedClientApp(ClientApp):
    """Writes messages into the folder ``diary``, for the test: their bytes, and the payloads."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Run the app."""
        folder = Path(str(context.run_config["diary"]))
        _note(folder, "down", message)
        try:
            reply: Message = super().__call__(message, context)
        except Exception as error:  # its text is sent
            _write(folder, "up", "bytes", str(error).encode())
            raise
        _note(folder, "up", reply)
        return reply


def _note(folder: Path, direction: str, message: Message) -> None:
    if direction == "up":
        _write(folder, direction, "bytes", b"".join(_contents(message)))
    if not message.has_content():
        return
    for record in message.content.array_records.values():
        if list(record) == [PAYLOAD]:
            with contextlib.suppress(TypeError, ValueError):  # a refusal, which is no array
                payload = record[PAYLOAD].numpy().tobytes()
                _write(folder, direction, "payload", payload)


def _write(folder: Path, direction: str, kind: str, data: bytes) -> None:
    (folder / f"{time.time_ns()}.{direction}.{kind}").write_bytes(data)


def _contents(value: Any) -> Iterator[bytes]:
    """Yield the bytes that Flower sends for an object and its parts."""
    yield bytes(value.deflate())
    for child in (value.children or {}).values():
        yield from _contents(child)
