"""Writes the result of each cell, passed, failed or skipped, as a JSON file into a folder.

The folder is named by ``FEDPARA_MATRIX_DIR`` (``build/matrix`` without it). ``conftest.py`` imports
the fixture and the hooks.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from harness.cells.base import Cell
from harness.cells.engines import EngineCell
from harness.cells.environments import installed_version
from harness.cells.fedml import FEDML
from harness.cells.loops import LoopCell
from harness.cells.strategies import PLUGIN_STRATEGIES, STRATEGIES
from harness.cells.transports import TransportCell
from harness.matrix.smoke import MARKERS

__all__ = ["AnyCell", "CellResult", "pytest_configure", "pytest_runtest_makereport", "result"]

AnyCell = Cell | EngineCell | TransportCell | LoopCell


@dataclass
class CellResult:
    """One cell and what its test has noted so far; ``refused_by`` if it must not train."""

    cell: AnyCell
    figures: dict[str, float] = field(default_factory=dict)
    refused_by: str = ""

    def note(self, **figures: float) -> None:
        """Keep figures by name; they are written even if the test fails afterwards."""
        self.figures.update(figures)


_KEY = pytest.StashKey[CellResult]()


@pytest.fixture
def result(request: pytest.FixtureRequest, cell: AnyCell) -> CellResult:
    """Return the object in which a cell's test notes its figures."""
    request.node.stash[_KEY] = CellResult(cell)
    return request.node.stash[_KEY]  # type: ignore[no-any-return]


def pytest_configure(config: pytest.Config) -> None:
    """Register a marker for each optimizer: ``-m fedadam`` runs its cells."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    for name, spec in STRATEGIES.items():
        config.addinivalue_line("markers", f"{name}: cells of Flower's {spec.class_name}")
    for name, spec in PLUGIN_STRATEGIES.items():
        config.addinivalue_line("markers", f"{name}: the plugin's {spec.class_name}")
    for name, fedml in FEDML.items():
        config.addinivalue_line("markers", f"{name}: cells of FedML's {fedml.label}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write the cell's file when its test is over."""
    report = yield
    found = item.stash.get(_KEY, None)
    if found is not None and (report.when == "call" or report.failed):
        _write(found, report)
    return report


def _write(found: CellResult, report: pytest.TestReport) -> None:
    cell = found.cell
    folder = Path(os.environ.get("FEDPARA_MATRIX_DIR") or "build/matrix")
    folder.mkdir(parents=True, exist_ok=True)
    error = str(getattr(report.longrepr, "reprcrash", report.longrepr)) if report.failed else ""
    content: dict[str, Any] = {
        **asdict(cell),
        "version": installed_version(cell.framework),
        "outcome": report.outcome,
        "error": error[:500],
        "skipped": _why_skipped(report),
        "seconds": round(report.duration, 1),
        "figures": found.figures,
        "refused_by": found.refused_by,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    path = folder / f"{cell.environment}--{cell.id}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _why_skipped(report: pytest.TestReport) -> str:
    """Return the reason that the test gave; "" if it ran."""
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return ""
    return report.longrepr[2].removeprefix("Skipped: ")


def _commit() -> str:
    """Return the commit of the working tree, marked if it has changes; empty outside git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit} with changes" if changed else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
