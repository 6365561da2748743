"""A sitting: the runs of one table, one after the other; a stopped one goes on with the next run.

Each run that is done has one file of JSON lines in the folder of results: the setting first, then a
line a round. A run that was stopped begins anew; none takes longer than some minutes.
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

__all__ = ["Sitting", "read_run"]


@dataclass
class Sitting:
    """The runs of one table.

    Attributes:
        settings: in their order.
        data: folder with the data sets.
        results: folder of the table's files.
        models: folder for pretrained models.
    """

    settings: Sequence[Setting]
    data: Path
    results: Path
    models: Path

    def run(self) -> None:
        """Do the runs that are not done; print progress with the time that is left."""
        for folder in (self.results, self.models):
            folder.mkdir(parents=True, exist_ok=True)
        todo = [s for s in self.settings if not self._is_done(s)]
        rounds = sum(s.rounds for s in todo)
        print(f"{len(todo)} of {len(self.settings)} runs to do, {rounds} rounds", flush=True)
        clock = _Clock(rounds)
        for setting in todo:
            self._run_one(setting, clock)

    def _run_one(self, setting: Setting, clock: _Clock) -> None:
        task = load(setting.task, self.data, setting.seed)
        federation, lines = Federation(task, setting, self.models), list[dict[str, Any]]()
        while federation.number < setting.rounds and not federation.diverged:
            lines.append(federation.round(task))
            clock.tell(setting, lines[-1])
        _replace(self._path(setting), _text(setting, lines))

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
