"""What was sent: bytes and tensors of every message, by round, direction and client.

Sizes are bytes as measured on the encoded messages; MB = 10^6 bytes.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedpara_plugins.errors import FedParaError

__all__ = ["Direction", "Ledger", "LedgerEntry", "LedgerTotals"]

logger = logging.getLogger(__name__)

Direction = Literal["up", "down"]


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One message.

    Attributes:
        round: of the run, counted as the framework counts.
        kind: what the message was for: ``train``, ``evaluate``, or the framework's word.
        direction: ``up`` (client to server) or ``down``.
        client: the client's name or number, as text.
        tensors: how many the message shares.
        raw_bytes: of the shared tensors before coding.
        encoded_bytes: of the payload as it was sent.
        dense_bytes: what the dense model's float tensors would have taken, uncoded.

    Raises:
        ValueError, TypeError: the direction is another word, or a field has another type.
    """

    round: int
    kind: str
    direction: Direction
    client: str
    tensors: int
    raw_bytes: int
    encoded_bytes: int
    dense_bytes: int

    def __post_init__(self) -> None:
        if self.direction not in ("up", "down"):
            raise ValueError(f"direction: expected 'up' or 'down', got {self.direction!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not (int if field.type == "int" else str):
                raise TypeError(f"{field.name}: expected {field.type}, got {value!r}")


class LedgerTotals(NamedTuple):
    """Sums over messages; sizes in bytes."""

    messages: int
    tensors: int
    raw_bytes: int
    encoded_bytes: int
    dense_bytes: int


class Ledger:
    """An append-only record of messages; may be shared by threads.

    Args:
        path: a JSON-lines file to which every entry is appended at once, so that a killed run
            leaves all but the line it was writing; None keeps entries in memory only. An existing
            file is continued, after cutting off a line that an earlier run did not finish.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._entries: list[LedgerEntry] = []
        self._lock = threading.Lock()
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _mend(self._path)

    def record(self, entry: LedgerEntry) -> None:
        """Add an entry, to the file too before this returns."""
        line = json.dumps(asdict(entry), separators=(",", ":")) + "\n"
        with self._lock:
            self._entries.append(entry)
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """What this object recorded, in order; not what its file held before."""
        with self._lock:
            return tuple(self._entries)

    def totals(
        self,
        direction: Direction | None = None,
        round: int | None = None,  # noqa: A002  (the word for it)
    ) -> LedgerTotals:
        """Sums over the entries of a direction and a round; None takes all."""
        return _total(self._chosen(direction, round))

    def line(self, round: int) -> str:  # noqa: A002
        """A round in one line, each direction next to the dense model's bytes."""
        parts = []
        for direction in ("up", "down"):
            total = _total(self._chosen(direction, round))
            part = f"{direction} {_megabytes(total.encoded_bytes)}"
            if total.dense_bytes and total.encoded_bytes:
                fewer = total.dense_bytes / total.encoded_bytes
                part += f" of {_megabytes(total.dense_bytes)} dense ({fewer:.1f}x fewer)"
            parts.append(part)
        count = len({entry.client for entry in self._chosen(None, round)})
        return f"round {round}: {', '.join(parts)}, {count} client{'' if count == 1 else 's'}"

    def _chosen(self, direction: str | None, number: int | None) -> list[LedgerEntry]:
        return [
            entry
            for entry in self.entries
            if direction in (None, entry.direction) and number in (None, entry.round)
        ]

    @staticmethod
    def read(path: Path | str) -> list[LedgerEntry]:
        """The entries of a file.

        A last line without its end is what a killed run leaves; it is ignored and the log says so.

        Raises:
            FedParaError: another line is not a ledger's.
            OSError: the file cannot be read.
        """
        lines = Path(path).read_bytes().split(b"\n")
        if lines.pop():
            logger.warning("%s: the last line is torn and was ignored", path)
        return [_entry(line, path, number) for number, line in enumerate(lines, start=1)]


def _total(entries: Iterable[LedgerEntry]) -> LedgerTotals:
    chosen = list(entries)
    return LedgerTotals(
        messages=len(chosen),
        tensors=sum(entry.tensors for entry in chosen),
        raw_bytes=sum(entry.raw_bytes for entry in chosen),
        encoded_bytes=sum(entry.encoded_bytes for entry in chosen),
        dense_bytes=sum(entry.dense_bytes for entry in chosen),
    )


def _entry(line: bytes, path: Path | str, number: int) -> LedgerEntry:
    try:
        values: Any = json.loads(line)
        if not isinstance(values, dict):
            raise TypeError("not an object")
        entry = LedgerEntry(**values)
    except (TypeError, ValueError) as error:
        raise FedParaError(
            f"{path}, line {number}: expected a ledger entry with "
            f"{', '.join(field.name for field in fields(LedgerEntry))}, got {line[:60]!r}: {error}"
        ) from error
    return entry


def _mend(path: Path) -> None:
    """Cut off a torn last line, so that the next entry does not continue it."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        logger.warning("%s: cut off a torn last line of %d bytes", path, len(data) - whole)
        with path.open("r+b") as file:
            file.truncate(whole)


def _megabytes(size: int) -> str:
    """Three significant digits: ``61.0 MB``, ``1.28 MB``, and ``12.3 kB`` below 0.1 MB."""
    value, unit = (size / 1e6, "MB") if size >= 100_000 else (size / 1e3, "kB")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"
