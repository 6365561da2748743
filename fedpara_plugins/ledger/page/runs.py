"""Ledgers summed up for the page: one pass over each file, and no message is kept."""

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
    Line,
    RunStart,
    Sum,
    read_lines,
    torn_bytes,
)

__all__ = ["DIRECTIONS", "RunData", "read_runs"]

DIRECTIONS: tuple[Direction, Direction] = ("down", "up")

HUGE = 1e100
"""A figure beyond it is that of a training that has diverged; it would only flatten the plot."""

Sums = dict[tuple[int, Direction], Sum]


@dataclass
class RunData:
    """One ledger, summed up.

    Attributes:
        name: for the legend.
        path: where it was read.
        torn: bytes of an unfinished last line, which was ignored.
        starts: what the run was set to, each time it was started.
        layers: sizes of the layers; of the last start if there were several.
        rounds: sums by round and direction.
        clients: sums by client and direction.
        figures: by source and metric, the value of each round; the last one where there are two.
    """

    name: str
    path: Path
    torn: int = 0
    starts: list[RunStart] = field(default_factory=list)
    layers: dict[str, LayerSize] = field(default_factory=dict)
    rounds: Sums = field(default_factory=dict)
    clients: dict[tuple[str, Direction], Sum] = field(default_factory=dict)
    figures: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        """Take in a line of the file."""
        if isinstance(line, LedgerEntry):
            self.rounds.setdefault((line.round, line.direction), Sum()).add(line)
            self.clients.setdefault((line.client, line.direction), Sum()).add(line)
        elif isinstance(line, Evaluation):
            if line.value is not None and abs(line.value) < HUGE:
                self.figures.setdefault((line.source, line.metric), {})[line.round] = line.value
        elif isinstance(line, LayerSize):
            self.layers[line.layer] = line
        else:
            self.starts.append(line)
            self.layers = {}

    @property
    def client_names(self) -> list[str]:
        """All clients, those with most bytes first, then by name."""
        sent: dict[str, int] = {}
        for (client, _), part in self.clients.items():
            sent[client] = sent.get(client, 0) + part.totals.encoded_bytes
        return sorted(sent, key=lambda client: (-sent[client], client))

    def sum(self, direction: Direction | None = None) -> Sum:
        """Over the whole run."""
        return Sum(part for (_, way), part in self.rounds.items() if direction in (None, way))

    def client_sum(self, client: str, direction: Direction | None = None) -> Sum:
        """Over one client's messages."""
        ways = DIRECTIONS if direction is None else (direction,)
        return Sum(self.clients[client, way] for way in ways if (client, way) in self.clients)

    def round_bytes(self, direction: Direction | None = None) -> dict[int, int]:
        """Encoded bytes by round, in order; every round that has a message in any direction."""
        found = {number: 0 for number, _ in sorted(self.rounds)}
        for (number, way), part in self.rounds.items():
            if direction in (None, way):
                found[number] += part.totals.encoded_bytes
        return found

    def sent_until(self) -> dict[int, int]:
        """Encoded bytes of both directions up to the end of each round."""
        rounds = self.round_bytes()
        return dict(zip(rounds, accumulate(rounds.values()), strict=True))


def read_runs(words: Sequence[str]) -> list[RunData]:
    """Read ledgers.

    Args:
        words: paths, or ``name=path``; without a name a run is called as its file.

    Raises:
        ConfigError: a name without a path.
        FedParaError: a file is no ledger; file and line are named.
        OSError: a file cannot be read.
    """
    given = [_named(word) for word in words]
    names = _distinct([(name or _stem(path), name is None, path) for name, path in given])
    runs = []
    for name, (_, path) in zip(names, given, strict=True):
        run = RunData(name, path)
        for line in read_lines(path):
            run.add(line)
        run.torn = torn_bytes(path)
        runs.append(run)
    return runs


def _named(word: str) -> tuple[str | None, Path]:
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


def _distinct(found: list[tuple[str, bool, Path]]) -> list[str]:
    """Tell runs of the same name apart: by their folders, and if that is not enough by numbers."""
    first = [name for name, _, _ in found]
    names = [
        f"{path.resolve().parent.name}/{name}" if own and first.count(name) > 1 else name
        for name, own, path in found
    ]
    counts: dict[str, int] = {}
    for place, name in enumerate(names):
        counts[name] = counts.get(name, 0) + 1
        if counts[name] > 1:
            names[place] = f"{name} ({counts[name]})"
    return names
