"""A sitting: the runs of one table, one after the other; a stopped one goes on with the next run.

The results of a table are one file of JSON lines: for each run that is done its setting, with its
key, then a line for each round with an evaluation. A run that was stopped begins anew; none takes
longer than some minutes. Several sittings may do a table's runs at once, by seed say.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation import Federation
from setting import Setting
from tasks import load

__all__ = ["Line", "Sitting", "read_runs"]

Line = dict[str, Any]


@dataclass
class Sitting:
    """The runs of one table.

    Attributes:
        settings: in their order.
        data: folder with the data sets.
        results: the table's file.
        models: folder for pretrained models.
    """

    settings: Sequence[Setting]
    data: Path
    results: Path
    models: Path

    def run(self) -> None:
        """Do the runs that are not done; print progress with the time that is left."""
        for folder in (self.results.parent, self.models):
            folder.mkdir(parents=True, exist_ok=True)
        done = read_runs(self.results)
        todo = [s for s in self.settings if s.key not in done]
        rounds = sum(s.rounds for s in todo)
        print(f"{len(todo)} of {len(self.settings)} runs to do, {rounds} rounds", flush=True)
        clock = _Clock(rounds)
        for setting in todo:
            self._run_one(setting, clock)

    def _run_one(self, setting: Setting, clock: _Clock) -> None:
        task = load(setting.task, self.data, setting.seed)
        federation, lines = Federation(task, setting, self.models), list[Line]()
        while federation.number < setting.rounds and not federation.diverged:
            lines.append(federation.round(task))
            clock.tell(setting, lines[-1])
        _append(self.results, _text(setting, lines))


class _Clock:
    """Progress, and the time left at the pace so far."""

    def __init__(self, rounds: int) -> None:
        self._begin = time.monotonic()
        self._left = rounds
        self._done = 0

    def tell(self, setting: Setting, line: Line) -> None:
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


def read_runs(path: Path) -> dict[str, list[Line]]:
    """Return the lines of each run in a table's file, by key; none if there is no file."""
    runs: dict[str, list[Line]] = {}
    key = ""
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        key = line.get("key", key)
        if "key" in line:
            runs[key] = []
        else:
            runs[key].append(line)
    return runs


def _text(setting: Setting, lines: Sequence[Line]) -> bytes:
    rows = [{"key": setting.key, **setting.to_json()}]
    rows += [line for line in lines if "accuracy" in line or "diverged" in line]
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()


def _append(path: Path, data: bytes) -> None:
    """Append a run in one write, so that other sittings' runs stay whole."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, data)
    finally:
        os.close(file)
