"""Common functions for the parts of the page. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Row", "listed", "results_of", "table"]

Row = Mapping[str, Any]


class _Cell(Protocol):
    @property
    def environment(self) -> str: ...
    @property
    def id(self) -> str: ...


def results_of(cells: Iterable[_Cell], folder: Path) -> dict[str, Row]:
    """Read the results of these cells from a folder, by cell, as far as they exist."""
    found: dict[str, Row] = {}
    for cell in cells:
        path = folder / f"{cell.environment}--{cell.id}.json"
        if path.exists():
            found[cell.id] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(lines: Iterable[Sequence[str]]) -> str:
    """Render lines of cells in Markdown; the second is the ruler."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def listed(values: Iterable[str]) -> str:
    """Return each value once, in order."""
    return ", ".join(sorted(set(values)))
