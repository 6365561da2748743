"""A sitting: the runs of one table, one after the other, which can stop and go on at any moment.

Each run has one file of JSON lines in the folder of results: the setting first, then a line a
round. What is needed to go on lies in another folder until the run is done.
"""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation import Federation
from setting import Setting
from tasks import Task, load

__all__ = ["Sitting", "read_run"]

SNAPSHOT_SECONDS = 60.0

# A run holds the locks of the exchange; they are free between two rounds.
copyreg.pickle(type(threading.Lock()), lambda lock: (threading.Lock, ()))


@dataclass
class Sitting:
    """The runs of one table.

    Attributes:
        settings: in their order.
        data: folder with the data sets.
        results: folder of the table's files.
        snapshots: folder for what a stopped run needs to go on.
    """

    settings: Sequence[Setting]
    data: Path
    results: Path
    snapshots: Path

    def run(self) -> None:
        """Do the runs that are not done; print progress with the time that is left."""
        for folder in (self.results, self.snapshots):
            folder.mkdir(parents=True, exist_ok=True)
        todo = [s for s in self.settings if not self._is_done(s)]
        rounds = sum(s.rounds for s in todo)
        print(f"{len(todo)} of {len(self.settings)} runs to do, {rounds} rounds", flush=True)
        clock = _Clock(rounds)
        for setting in todo:
            self._run_one(setting, clock)

    def _run_one(self, setting: Setting, clock: _Clock) -> None:
        task = load(setting.task, self.data, setting.seed)
        path, snapshot = self._path(setting), self.snapshots / f"{setting.key}.pickle"
        federation, lines = self._resumed(setting, task, snapshot)
        clock.skip(federation.number)
        saved = time.monotonic()
        while federation.number < setting.rounds and not federation.diverged:
            lines.append(federation.round(task))
            clock.tell(setting, lines[-1])
            if time.monotonic() - saved > SNAPSHOT_SECONDS:
                saved = time.monotonic()
                _replace(snapshot, pickle.dumps((federation, lines)))
        _replace(path, _text(setting, lines))
        snapshot.unlink(missing_ok=True)

    def _resumed(
        self, setting: Setting, task: Task, snapshot: Path
    ) -> tuple[Federation, list[dict[str, Any]]]:
        if snapshot.exists():
            return pickle.loads(snapshot.read_bytes())  # type: ignore[no-any-return]
        return Federation(task, setting, self.snapshots), []

    def _path(self, setting: Setting) -> Path:
        return self.results / f"{setting.key}.jsonl"

    def _is_done(self, setting: Setting) -> bool:
        return self._path(setting).exists()


class _Clock:
    """Progress, and the time left at the pace so far."""

    def __init__(self, rounds: int) -> None:
        self._begin = time.monotonic()
        self._left = rounds
        self._done = 0

    def skip(self, rounds: int) -> None:
        """Leave out rounds that an earlier sitting did."""
        self._left -= rounds

    def tell(self, setting: Setting, line: dict[str, Any]) -> None:
        """Print a line about a round."""
        self._done += 1
        self._left -= 1
        if line.get("diverged"):
            self._left -= setting.rounds - line["round"]
        left = (time.monotonic() - self._begin) / self._done * self._left
        figures = " ".join(f"{k} {line[k]:.2f}" for k in ("accuracy", "own") if k in line)
        print(
            f"{setting.task} | {setting.name} | seed {setting.seed} | round {line['round']} of "
            f"{setting.rounds} | {figures} | {left / 60:.1f} min left",
            flush=True,
        )


def read_run(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a run's setting and its rounds, from its file."""
    first, *rounds = (json.loads(line) for line in path.read_text().splitlines())
    return first, rounds


def _text(setting: Setting, lines: Sequence[dict[str, Any]]) -> bytes:
    rows = [setting.to_json(), *lines]
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
