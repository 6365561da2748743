"""The ledger of a run in progress: it sums up messages, and writes every line at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from fedpara_plugins.ledger.appended_file import AppendedFile
from fedpara_plugins.ledger.files import read_lines
from fedpara_plugins.ledger.records import (
    Direction,
    Evaluation,
    LayerSize,
    LedgerEntry,
    LedgerLine,
    RunStart,
)
from fedpara_plugins.support.outages import Outages
from fedpara_plugins.support.units import readable_bytes

__all__ = ["Ledger", "LedgerTotals", "RunningTotals"]

ROUNDS_WITH_NAMES = 4
"""Rounds of which the clients' names are kept, to count each once; of others their number is."""


class LedgerTotals(NamedTuple):
    """Numbers of messages and tensors, and their sizes in bytes."""

    messages: int
    tensors: int
    raw_bytes: int
    encoded_bytes: int
    dense_bytes: int


class RunningTotals:
    """Running totals over messages.

    Attributes:
        values: the fields of `LedgerTotals`, in order.
        unknown: number of messages with bytes whose dense size is unknown.
    """

    __slots__ = ("unknown", "values")

    def __init__(self, parts: Iterable[RunningTotals] = ()) -> None:
        self.values = [0, 0, 0, 0, 0]
        self.unknown = 0
        for part in parts:
            self.values = [a + b for a, b in zip(self.values, part.values, strict=True)]
            self.unknown += part.unknown

    def add(self, entry: LedgerEntry) -> None:
        """Add a message."""
        values = self.values
        values[0] += 1
        values[1] += entry.tensors
        values[2] += entry.raw_bytes
        values[3] += entry.encoded_bytes
        values[4] += entry.dense_bytes
        self.unknown += bool(entry.encoded_bytes and not entry.dense_bytes)

    @property
    def totals(self) -> LedgerTotals:
        """The totals."""
        return LedgerTotals(*self.values)

    @property
    def fewer(self) -> float | None:
        """Dense bytes divided by sent bytes; None if either is 0, or a dense size is unknown."""
        total = self.totals
        if self.unknown or not total.dense_bytes or not total.encoded_bytes:
            return None
        return total.dense_bytes / total.encoded_bytes


class _ClientCounts:
    """How many clients a round had messages with."""

    def __init__(self) -> None:
        self._names: OrderedDict[int, set[str]] = OrderedDict()
        self._counts: dict[int, int] = {}

    def add(self, number: int, client: str) -> None:
        names = self._names.get(number)
        if names is None:
            names = self._names[number] = set()
            if len(self._names) > ROUNDS_WITH_NAMES:
                earlier, others = self._names.popitem(last=False)
                self._counts[earlier] = max(len(others), self._counts.get(earlier, 0))
        names.add(client)

    def of(self, number: int) -> int:
        return max(len(self._names.get(number, ())), self._counts.get(number, 0))


class Ledger:
    """An append-only record of messages and of the model's metrics; safe for use by threads.

    With a file, memory holds sums alone.

    Args:
        path: a file to which every line is appended at once, so that a killed run loses at most the
            line that it was writing; CSV if it ends in ``.csv``, else JSON lines. None keeps the
            entries in memory only. An existing file is continued, after an unfinished last line is
            cut off.
        sums_only: whether to keep no entries in memory without a file either.
        outages: what the disk refuses is noted there, and later lines are tried again. None raises
            the system's error.

    Raises:
        FedParaError: the existing file's format is not the one that its suffix asks for.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        sums_only: bool = False,
        outages: Outages | None = None,
    ) -> None:
        self._file = None if path is None else AppendedFile(Path(path), outages)
        self._lines: list[LedgerLine] | None = None if path is not None or sums_only else []
        self._sums: dict[tuple[int, Direction], RunningTotals] = {}
        self._clients = _ClientCounts()
        self._lock = threading.Lock()

    # Writing

    def record(self, entry: LedgerEntry) -> None:
        """Add a message; it is in the file when this returns."""
        with self._lock:
            key = entry.round, entry.direction
            self._sums.setdefault(key, RunningTotals()).add(entry)
            self._clients.add(entry.round, entry.client)
            self._keep(entry)

    def log(
        self,
        round: int,  # noqa: A002  (the field's word)
        metrics: Mapping[str, float] | None = None,
        /,
        *,
        source: str = "server",
        **more: float,
    ) -> None:
        """Add metrics of the model: ``ledger.log(3, accuracy=0.91)``.

        Args:
            round: the round after which the model was evaluated; 0 is before any training.
            metrics: values by name.
            source: who evaluated it: ``server``, ``clients``, or another word.
            more: values by name.
        """
        for name, value in {**(metrics or {}), **more}.items():
            line = Evaluation(round=round, source=source, metric=name, value=float(value))
            with self._lock:
                self._keep(line)

    def describe(self, line: RunStart | LayerSize) -> None:
        """Add the run's settings or a layer's size; once a run, before its messages."""
        with self._lock:
            self._keep(line)

    def _keep(self, line: LedgerLine) -> None:
        if self._file is not None:
            self._file.append(line)
        elif self._lines is not None:
            self._lines.append(line)

    # Reading

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """Messages that this object recorded, in order; not those that its file held before.

        With a file, they are read from it; with ``sums_only`` and no file there are none.
        """
        return tuple(line for line in self._recorded() if isinstance(line, LedgerEntry))

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Metrics that were logged to this object, in order; see `entries`."""
        return tuple(line for line in self._recorded() if isinstance(line, Evaluation))

    def _recorded(self) -> list[LedgerLine]:
        with self._lock:
            return list(self._lines or ()) if self._file is None else self._file.appended()

    def totals(
        self,
        direction: Direction | None = None,
        round: int | None = None,  # noqa: A002
    ) -> LedgerTotals:
        """Return the totals over the messages of a direction and a round; None means all."""
        return self._sum(direction, round).totals

    def _sum(self, direction: Direction | None, number: int | None) -> RunningTotals:
        with self._lock:
            return RunningTotals(
                part
                for (round_, way), part in self._sums.items()
                if direction in (None, way) and number in (None, round_)
            )

    def line(self, round: int) -> str:  # noqa: A002
        """Return a summary of a round in one line, with the dense model's bytes for comparison."""
        parts = []
        for direction in ("up", "down"):
            found = self._sum(direction, round)
            part = f"{direction} {readable_bytes(found.totals.encoded_bytes)}"
            if (fewer := found.fewer) is not None:
                dense = readable_bytes(found.totals.dense_bytes)
                part += f" of {dense} dense ({fewer:.1f}x fewer)"
            parts.append(part)
        count = self._clients.of(round)
        return f"round {round}: {', '.join(parts)}, {count} client{'' if count == 1 else 's'}"

    def run_line(self) -> str | None:
        """Return a summary of the whole run in one line; None if nothing was sent."""
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
        """Return the messages of a file of either format; `read_lines` yields other lines too.

        A killed run may leave an unfinished last line; it is ignored, with a warning in the log.

        Raises:
            FedParaError: another line is not a ledger's, or there is no finished line.
            OSError: the file cannot be read.
        """
        return [line for line in read_lines(path) if isinstance(line, LedgerEntry)]
