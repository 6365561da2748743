"""Tables of finished runs, from their files alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from setting import Setting
from sitting import Line, read_runs

__all__ = ["by_rule", "markdown"]

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
    runs = read_runs(results)
    for setting in settings:
        if setting.key in runs:
            found[setting.task][setting.name].append(runs[setting.key])
    return "\n\n".join(_table(task, rows) for task, rows in found.items())


def by_rule(settings: Sequence[Setting], results: Path) -> str:
    """Return accuracies and bytes by rule of aggregation, as Markdown.

    The names of runs end in the rule. The first rule has its accuracy at the end, the others have
    their difference from it, by seed. Bytes are those of all rounds, first contacts apart.
    """
    runs = read_runs(results)
    found: dict[str, dict[str, dict[int, list[Line]]]] = defaultdict(lambda: defaultdict(dict))
    for setting in settings:
        if setting.key in runs:
            row, _, rule = setting.name.rpartition(", ")
            found[f"{setting.task}, {row}"][rule][setting.seed] = runs[setting.key]
    rules = list(dict.fromkeys(setting.name.rpartition(", ")[2] for setting in settings))
    heads = [f"| run | seeds | {rules[0]}, % | it misses, % |"]
    heads += [f" {rule} |" for rule in rules[1:]] + [f" kB, {rule} |" for rule in rules]
    lines = ["".join(heads), "| --- |" + " ---: |" * (2 * len(rules) + 2)]
    for row, by_seed in found.items():
        first = by_seed[rules[0]]
        missed = [100 * line["missed"] for run in first.values() for line in run]
        cells = [row, str(len(first)), _interval([_end(run) for run in first.values()])]
        cells.append(f"{mean(missed or [0]):.1f}")
        for rule in rules[1:]:
            pairs = [(run, first[seed]) for seed, run in by_seed[rule].items() if seed in first]
            cells.append(_interval([_end(a) - _end(b) for a, b in pairs], sign="+"))
        for rule in rules:
            ends = [run[-1]["up"] + run[-1]["down"] for run in by_seed[rule].values()]
            cells.append(f"{mean(ends) / 1e3:.0f}" if ends else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def _interval(values: Sequence[float], sign: str = "-") -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:{sign}.1f}"
    half = T95.get(len(values), 2.6) * stdev(values) / sqrt(len(values))
    return f"{mean(values):{sign}.1f} ± {half:.1f}"
