"""Reader of ledgers for the page: it sums each file up in one pass and keeps no message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from fedpara_plugins.errors import ConfigError, FedParaError
from fedpara_plugins.ledger import (
    Direction,
    Evaluation,
    LayerSize,
    LedgerEntry,
    LedgerLine,
    RunningTotals,
    RunStart,
    read_lines,
    torn_bytes,
)

__all__ = ["DIRECTIONS", "RunData", "read_run", "read_runs"]

_Key = TypeVar("_Key", int, str)

DIRECTIONS: tuple[Direction, Direction] = ("down", "up")

MOST_KEPT = 2**28
"""Bytes that a file's different rounds, clients, metrics and layers may take, about. A ledger of
10,000 clients and 1,000 rounds takes 10 MB."""
KEPT_EACH = 400
"""What each of them takes, besides its name."""

HUGE = 1e100
"""A metric beyond it means that training diverged; it would flatten the plot and is left out."""


@dataclass
class RunData:
    """One ledger, summed up.

    Attributes:
        name: the run's name in the legend.
        path: the ledger's file.
        torn: bytes of an unfinished last line, which was ignored.
        starts: the settings of each start of the run.
        layers: sizes of the layers, by name; those of the last start if there are several.
        rounds: totals by round and direction.
        clients: totals by client and direction.
        metrics: values by round, for each source and metric; the last value of each round.
    """

    name: str
    path: Path
    torn: int = 0
    starts: list[RunStart] = field(default_factory=list)
    layers: dict[str, LayerSize] = field(default_factory=dict)
    rounds: dict[tuple[int, Direction], RunningTotals] = field(default_factory=dict)
    clients: dict[tuple[str, Direction], RunningTotals] = field(default_factory=dict)
    metrics: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    _kept: int = 0

    def add(self, line: LedgerLine) -> None:
        """Add a line of the file.

        Raises:
            FedParaError: the file names too many different things.
        """
        if isinstance(line, LedgerEntry):
            self._totals(self.rounds, (line.round, line.direction)).add(line)
            self._totals(self.clients, (line.client, line.direction)).add(line)
        elif isinstance(line, Evaluation):
            if line.value is not None and abs(line.value) < HUGE:
                values = self.metrics.setdefault((line.source, line.metric), {})
                if line.round not in values:
                    self._keep(line.source + line.metric if not values else "")
                values[line.round] = line.value
        elif isinstance(line, LayerSize):
            if line.layer not in self.layers:
                self._keep(line.layer)
            self.layers[line.layer] = line
        else:
            self._keep(line.version + line.method + line.codec)
            self.starts.append(line)
            self.layers = {}

    def _totals(
        self, where: dict[tuple[_Key, Direction], RunningTotals], key: tuple[_Key, Direction]
    ) -> RunningTotals:
        found = where.get(key)
        if found is None:
            self._keep(str(key[0]))
            found = where[key] = RunningTotals()
        return found

    def _keep(self, name: str) -> None:
        self._kept += KEPT_EACH + len(name)
        if self._kept > MOST_KEPT:
            raise FedParaError(
                f"{self.path}: names more rounds, clients, metrics and layers than fit into "
                f"{MOST_KEPT} bytes; is it a ledger?"
            )

    @property
    def client_names(self) -> list[str]:
        """All clients, ordered by their bytes, largest first, then by name."""
        sent: dict[str, int] = {}
        for (client, _), part in self.clients.items():
            sent[client] = sent.get(client, 0) + part.totals.encoded_bytes
        return sorted(sent, key=lambda client: (-sent[client], client))

    def totals(self, direction: Direction | None = None) -> RunningTotals:
        """Return the totals over the whole run, of one direction or of both."""
        return RunningTotals(
            part for (_, way), part in self.rounds.items() if direction in (None, way)
        )

    def client_totals(self, client: str, direction: Direction | None = None) -> RunningTotals:
        """Return the totals over one client's messages, of one direction or of both."""
        ways = DIRECTIONS if direction is None else (direction,)
        return RunningTotals(
            self.clients[client, way] for way in ways if (client, way) in self.clients
        )

    def round_bytes(self, direction: Direction | None = None) -> dict[int, int]:
        """Return the encoded bytes of each round that has a message in any direction, in order."""
        found = {number: 0 for number, _ in sorted(self.rounds)}
        for (number, way), part in self.rounds.items():
            if direction in (None, way):
                found[number] += part.totals.encoded_bytes
        return found

    def sent_until(self) -> dict[int, int]:
        """Return the encoded bytes of both directions up to the end of each round."""
        rounds = self.round_bytes()
        return dict(zip(rounds, accumulate(rounds.values()), strict=True))


def read_runs(words: Sequence[str]) -> list[RunData]:
    """Read the ledgers of several runs.

    Args:
        words: paths, or ``name=path``; without a name, a run gets the name of its file.

    Raises:
        ConfigError: a name without a path.
        FedParaError: a file is no ledger; the message names file and line.
        OSError: a file cannot be read.
    """
    given = [_split_word(word) for word in words]
    names = _distinct_names([(name or _stem(path), name is None, path) for name, path in given])
    return [read_run(name, path) for name, (_, path) in zip(names, given, strict=True)]


def read_run(name: str, path: Path) -> RunData:
    """Read one ledger.

    Args:
        name: of the run.
        path: of the file.

    Raises:
        FedParaError: the file is no ledger; the message names file and line.
        OSError: the file cannot be read.
    """
    run = RunData(name, path)
    for line in read_lines(path):
        run.add(line)
    run.torn = torn_bytes(path)
    return run


def _split_word(word: str) -> tuple[str | None, Path]:
    name, equals, path = word.partition("=")
    if not equals or Path(word).exists():
        return None, Path(word)
    if not name or not path:
        raise ConfigError(f"expected a ledger's path, or name=path; got {word!r}")
    return name, Path(path)


def _stem(path: Path) -> str:
    stem = path.name
    for suffix in (".jsonl", ".csv", ".json", ".ledger"):
        stem = stem.removesuffix(suffix)
    return stem or path.name


def _distinct_names(found: list[tuple[str, bool, Path]]) -> list[str]:
    """Return names that differ, by folders, or else by numbers.

    Args:
        found: for each run its name, whether that is its file's, and the file.
    """
    first = [name for name, _, _ in found]
    names = [
        f"{path.resolve().parent.name}/{name}" if from_file and first.count(name) > 1 else name
        for name, from_file, path in found
    ]
    counts: dict[str, int] = {}
    for place, name in enumerate(names):
        counts[name] = counts.get(name, 0) + 1
        if counts[name] > 1:
            names[place] = f"{name} ({counts[name]})"
    return names
