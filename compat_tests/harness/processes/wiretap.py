"""A TCP proxy that counts the bytes that pass, tells HTTP's heads from bodies, and can record all.

It hands bytes on unchanged and counts the content of TCP. With TLS that is ciphertext, of which
only the total is known.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

__all__ = ["HttpMeter", "Wiretap"]

PIECE = 1 << 16
HEAD_END = b"\r\n\r\n"


@dataclass
class HttpMeter:
    """Heads and bodies of one direction of an HTTP/1.1 connection.

    Attributes:
        named: called with each complete head's first line; gives the name to count under.
        heads: bytes of heads and of the framing of bodies, by name.
        bodies: bytes of bodies, by name.
        count: messages by name.
    """

    named: Callable[[str], str]
    heads: Counter[str] = field(default_factory=Counter)
    bodies: Counter[str] = field(default_factory=Counter)
    count: Counter[str] = field(default_factory=Counter)
    _buffer: bytearray = field(default_factory=bytearray)
    _name: str = ""
    _left: int = 0
    _chunked: bool = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._buffer += data
        while self._buffer and self._step():
            pass

    def _step(self) -> bool:
        """Account for one part of the buffer; False if it is not complete yet."""
        if self._left:
            taken = min(self._left, len(self._buffer))
            self.bodies[self._name] += taken
            self._left -= taken
            del self._buffer[:taken]
            return True
        end = self._buffer.find(b"\r\n" if self._chunked else HEAD_END)
        if end < 0:
            return False
        if self._chunked:
            return self._next_chunk(end)
        self._next_head(end + len(HEAD_END))
        return True

    def _next_head(self, size: int) -> None:
        lines = bytes(self._buffer[: size - len(HEAD_END)]).decode("latin-1").split("\r\n")
        del self._buffer[:size]
        fields = {k.strip().lower(): v.strip() for k, _, v in (x.partition(":") for x in lines[1:])}
        self._name = self.named(lines[0])
        self.heads[self._name] += size
        self.count[self._name] += 1
        self._left = int(fields.get("content-length", 0))
        self._chunked = "chunked" in fields.get("transfer-encoding", "").lower()

    def _next_chunk(self, end: int) -> bool:
        """Read the line with a chunk's size; it and the line break after the chunk are framing."""
        line = bytes(self._buffer[:end])
        if not line:  # the line break behind a chunk
            del self._buffer[:2]
            self.heads[self._name] += 2
            return True
        size = int(line.split(b";")[0], 16)
        if size == 0 and len(self._buffer) < end + 4:
            return False
        framing = end + 2 if size else end + 4  # an empty chunk is the last
        self.heads[self._name] += framing
        del self._buffer[:framing]
        self._left, self._chunked = size, size > 0
        return True


class _Connection:
    """One client's connection: two streams, metered as requests and answers to them."""

    def __init__(self, *, metered: bool, recorded: bool) -> None:
        self._asked: deque[str] = deque()
        self._lock = threading.Lock()
        self._metered = metered
        self.bytes = Counter[str]()
        self.record = {"up": bytearray(), "down": bytearray()} if recorded else None
        self.meters = {"up": HttpMeter(self._request), "down": HttpMeter(self._answer)}

    def passed(self, direction: str, data: bytes) -> None:
        with self._lock:
            self.bytes[direction] += len(data)
            if self.record is not None:
                self.record[direction] += data
            if self._metered:
                self.meters[direction].feed(data)

    def _request(self, line: str) -> str:
        """Name a request: ``POST /v1/fleet/push-object HTTP/1.1`` becomes push-object."""
        self._asked.append(line.split(" ")[1].rpartition("/")[2])
        return self._asked[-1]

    def _answer(self, line: str) -> str:
        return self._asked.popleft()


class Wiretap:
    """Listens on loopback and connects everyone who comes to one server.

    Args:
        port: port of the server, on loopback.
        record: whether to keep all bytes.
        metered: whether it is HTTP in plain text.

    Attributes:
        port: port to connect to.
    """

    def __init__(self, port: int, *, record: bool = False, metered: bool = True) -> None:
        self._target = ("127.0.0.1", port)
        self._options = {"recorded": record, "metered": metered}
        self._connections: list[_Connection] = []
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Wiretap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in [self._listener, *self._sockets]:
            _shut(each)

    def total(self, direction: str) -> int:
        """Count the bytes that have passed: ``up`` to the server, ``down`` from it."""
        return sum(connection.bytes[direction] for connection in list(self._connections))

    def http(self, direction: str, part: str) -> Counter[str]:
        """Count bytes (or, of part ``count``, messages) by the request's name.

        Args:
            direction: ``up`` or ``down``.
            part: ``heads``, ``bodies`` or ``count``.
        """
        found: Counter[str] = Counter()
        for connection in list(self._connections):
            found.update(getattr(connection.meters[direction], part))
        return found

    def streams(self, direction: str) -> list[bytes]:
        """Return the bytes that passed, one stream a connection."""
        records = [connection.record for connection in list(self._connections)]
        return [bytes(record[direction]) for record in records if record is not None]

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:  # the server is not there (yet): so is the proxy
                _shut(near)
                continue
            self._sockets += [near, far]
            connection = _Connection(**self._options)
            self._connections.append(connection)
            for source, sink, direction in ((near, far, "up"), (far, near, "down")):
                pump = (source, sink, connection, direction)
                threading.Thread(target=self._pump, args=pump, daemon=True).start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, connection: _Connection, direction: str
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                connection.passed(direction, data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _shut(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
