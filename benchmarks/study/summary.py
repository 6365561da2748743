"""Tables of finished runs, from their files alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from setting import Setting
from sitting import read_run

__all__ = ["markdown"]

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t for an interval of 95 % of the mean, by number of seeds."""

LAST = 3
"""Evaluations at the end whose mean counts as the end."""


def markdown(settings: Sequence[Setting], results: Path) -> str:
    """Return the table of those runs that are done, tasks apart, as Markdown.

    The bytes to a target are those of all rounds, in both directions, first contacts included,
    until the mean of three evaluations reaches the end of the task's first row minus 0.5 points.
    """
    found: dict[str, dict[str, list[list[dict[str, Any]]]]] = defaultdict(lambda: defaultdict(list))
    for setting in settings:
        path = results / f"{setting.key}.jsonl"
        if path.exists():
            found[setting.task][setting.name].append(read_run(path)[1])
    return "\n\n".join(_table(task, rows) for task, rows in found.items())


def _table(task: str, rows: Mapping[str, list[list[dict[str, Any]]]]) -> str:
    target = min(_end(run) for run in next(iter(rows.values()))) - 0.5
    lines = [
        f"### {task} (target {target:.1f} %)",
        "",
        "| run | seeds | end, % | clients' own, % | MB up | MB down | MB first | MB to target |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in rows.items():
        last = [run[-1] for run in runs]
        own = [line["own"] for line in last if "own" in line]
        ends = [_end(run) for run in runs if _accuracies(run)]
        to = [_bytes_to(run, target) for run in runs]
        cells = [
            name,
            str(len(runs)),
            _interval(ends) + (" (diverged)" if any("diverged" in line for line in last) else ""),
            _interval(own),
            *(f"{mean(line[key] for line in last) / 1e6:.2f}" for key in ("up", "down", "first")),
            "never" if None in to else f"{mean(t for t in to if t is not None) / 1e6:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _accuracies(run: Sequence[Mapping[str, Any]]) -> list[float]:
    return [line["accuracy"] for line in run if "accuracy" in line]


def _end(run: Sequence[Mapping[str, Any]]) -> float:
    return mean(_accuracies(run)[-LAST:] or [0.0])


def _bytes_to(run: Sequence[Mapping[str, Any]], target: float) -> int | None:
    window: list[float] = []
    for line in run:
        if "accuracy" in line:
            window = [*window, line["accuracy"]][-LAST:]
            if len(window) == LAST and mean(window) >= target:
                return int(line["up"] + line["down"] + line["first"])
    return None


def _interval(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    half = T95.get(len(values), 2.6) * stdev(values) / sqrt(len(values))
    return f"{mean(values):.1f} ± {half:.1f}"
