"""The ledger of a run that is going on: adds up, and writes every line at once."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from fedpara_plugins.ledger.files import CSV_HEAD, encode, is_csv, mend, read_lines
from fedpara_plugins.ledger.records import (
    Direction,
    Evaluation,
    LayerSize,
    LedgerEntry,
    Line,
    RunStart,
)
from fedpara_plugins.support.units import readable_bytes

__all__ = ["Ledger", "LedgerTotals", "Sum"]


class LedgerTotals(NamedTuple):
    """Sums over messages; sizes in bytes."""

    messages: int
    tensors: int
    raw_bytes: int
    encoded_bytes: int
    dense_bytes: int


class Sum:
    """A running sum over messages.

    Attributes:
        values: the figures of `LedgerTotals`.
        unknown: messages with bytes whose dense size is not known.
    """

    __slots__ = ("unknown", "values")

    def __init__(self, parts: Iterable[Sum] = ()) -> None:
        self.values = [0, 0, 0, 0, 0]
        self.unknown = 0
        for part in parts:
            self.values = [a + b for a, b in zip(self.values, part.values, strict=True)]
            self.unknown += part.unknown

    def add(self, entry: LedgerEntry) -> None:
        """Count a message."""
        values = self.values
        values[0] += 1
        values[1] += entry.tensors
        values[2] += entry.raw_bytes
        values[3] += entry.encoded_bytes
        values[4] += entry.dense_bytes
        self.unknown += bool(entry.encoded_bytes and not entry.dense_bytes)

    @property
    def totals(self) -> LedgerTotals:
        """The figures."""
        return LedgerTotals(*self.values)

    @property
    def fewer(self) -> float | None:
        """Dense bytes over sent ones; None if one of them is nothing, or not known throughout."""
        total = self.totals
        if self.unknown or not total.dense_bytes or not total.encoded_bytes:
            return None
        return total.dense_bytes / total.encoded_bytes


class Ledger:
    """An append-only record of messages and of how good the model was; threads may share it.

    Args:
        path: a file to which every line is appended at once, so that a killed run leaves all but
            the line it was writing; CSV if it ends in ``.csv``, else JSON lines. None keeps the
            entries in memory only. An existing file is continued, after cutting off a line that an
            earlier run did not finish.

    Raises:
        FedParaError: the existing file is of another kind than its suffix says.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self._path = None if path is None else Path(path)
        self._entries: list[LedgerEntry] = []
        self._evaluations: list[Evaluation] = []
        self._sums: dict[tuple[int, Direction], Sum] = {}
        self._clients: dict[int, set[str]] = {}
        self._lock = threading.Lock()
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                mend(self._path)

    # Writing

    def record(self, entry: LedgerEntry) -> None:
        """Add a message, to the file too before this returns."""
        with self._lock:
            self._entries.append(entry)
            self._sums.setdefault((entry.round, entry.direction), Sum()).add(entry)
            self._clients.setdefault(entry.round, set()).add(entry.client)
            self._write(entry)

    def log(
        self,
        round: int,  # noqa: A002  (the word for it)
        metrics: Mapping[str, float] | None = None,
        /,
        *,
        source: str = "server",
        **more: float,
    ) -> None:
        """Note how good the model is: ``ledger.log(3, accuracy=0.91)``.

        Args:
            round: after which this was found; 0 is before any training.
            metrics: figures by name.
            source: ``server``, ``clients``, or another word for who found it.
            more: figures by name.
        """
        for name, value in {**(metrics or {}), **more}.items():
            line = Evaluation(round=round, source=source, metric=name, value=float(value))
            with self._lock:
                self._evaluations.append(line)
                self._write(line)

    def describe(self, line: RunStart | LayerSize) -> None:
        """Add what a run is set to, or how large a layer is; once a run, before its messages."""
        with self._lock:
            self._write(line)

    def _write(self, line: Line) -> None:
        if self._path is None:
            return
        as_csv = is_csv(self._path)
        with self._path.open("a", encoding="utf-8", newline="\n") as file:
            if as_csv and not file.tell():
                file.write(f"{CSV_HEAD}\n")
            file.write(encode(line, as_csv=as_csv))

    # Reading

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """What this object recorded, in order; not what its file held before."""
        with self._lock:
            return tuple(self._entries)

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """What was logged to this object, in order."""
        with self._lock:
            return tuple(self._evaluations)

    def totals(
        self,
        direction: Direction | None = None,
        round: int | None = None,  # noqa: A002
    ) -> LedgerTotals:
        """Sums over the messages of a direction and a round; None takes all."""
        return self._sum(direction, round).totals

    def _sum(self, direction: Direction | None, number: int | None) -> Sum:
        with self._lock:
            return Sum(
                part
                for (round_, way), part in self._sums.items()
                if direction in (None, way) and number in (None, round_)
            )

    def line(self, round: int) -> str:  # noqa: A002
        """A round in one line, each direction next to the dense model's bytes."""
        parts = []
        for direction in ("up", "down"):
            found = self._sum(direction, round)
            part = f"{direction} {readable_bytes(found.totals.encoded_bytes)}"
            if (fewer := found.fewer) is not None:
                dense = readable_bytes(found.totals.dense_bytes)
                part += f" of {dense} dense ({fewer:.1f}x fewer)"
            parts.append(part)
        count = len(self._clients.get(round, ()))
        return f"round {round}: {', '.join(parts)}, {count} client{'' if count == 1 else 's'}"

    def run_line(self) -> str | None:
        """The whole run in one line, next to the dense model's bytes; None if nothing was sent."""
        up, down = self.totals(direction="up"), self.totals(direction="down")
        sent = up.encoded_bytes + down.encoded_bytes
        if not sent:
            return None
        return (
            f"whole run: up {up.encoded_bytes / 1e6:.2f} MB, down {down.encoded_bytes / 1e6:.2f} "
            f"MB; dense: up {up.dense_bytes / 1e6:.2f} MB, down {down.dense_bytes / 1e6:.2f} MB "
            f"({(up.dense_bytes + down.dense_bytes) / sent:.1f} times fewer)"
        )

    @staticmethod
    def read(path: Path | str) -> list[LedgerEntry]:
        """The messages of a file of either format; `read_lines` gives its other lines too.

        A last line without its end is what a killed run leaves; it is ignored and the log says so.

        Raises:
            FedParaError: another line is not a ledger's, or there is no whole line.
            OSError: the file cannot be read.
        """
        return [line for line in read_lines(path) if isinstance(line, LedgerEntry)]
