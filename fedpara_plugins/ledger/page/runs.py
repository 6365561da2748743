"""Reader of ledgers for the page: it sums each file up in one pass and keeps no message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from fedpara_plugins.errors import ConfigError
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

__all__ = ["DIRECTIONS", "RunData", "read_runs"]

DIRECTIONS: tuple[Direction, Direction] = ("down", "up")

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

    def add(self, line: LedgerLine) -> None:
        """Add a line of the file."""
        if isinstance(line, LedgerEntry):
            self.rounds.setdefault((line.round, line.direction), RunningTotals()).add(line)
            self.clients.setdefault((line.client, line.direction), RunningTotals()).add(line)
        elif isinstance(line, Evaluation):
            if line.value is not None and abs(line.value) < HUGE:
                self.metrics.setdefault((line.source, line.metric), {})[line.round] = line.value
        elif isinstance(line, LayerSize):
            self.layers[line.layer] = line
        else:
            self.starts.append(line)
            self.layers = {}

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
    runs = []
    for name, (_, path) in zip(names, given, strict=True):
        run = RunData(name, path)
        for line in read_lines(path):
            run.add(line)
        run.torn = torn_bytes(path)
        runs.append(run)
    return runs


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
