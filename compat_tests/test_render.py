"""The page of results: the sections of runs on an engine and over a transport."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.cells.engines import ENGINE_CELLS
from harness.cells.loops import LOOP_CELLS, LOOP_OPTIONS, LOOPS
from harness.cells.transports import TRANSPORT_CELLS, TransportCell
from harness.matrix.page import results_of
from harness.matrix.results import AnyCell
from render import read, render

LACKS = "MPI needs mpirun (engine_tests/install.sh installs it)"
NOT_RUN = "Not run: `tox run -e fedml-engines`."
MISSING = "- `tox run -e fedml-engines`:"


def row(cell: AnyCell, **changed: Any) -> dict[str, Any]:
    return {
        **asdict(cell),
        "version": "0.9.6",
        "outcome": "passed",
        "error": "",
        "skipped": "",
        "seconds": 12.3,
        "figures": {"accuracy": 0.8125, "ratio_to_dense": 6.25},
        "refused_by": "",
        "commit": "abc",
        "date": "2026-11-27",
        **changed,
    }


def page_of(folder: Path, rows: Iterable[tuple[AnyCell, dict[str, Any]]]) -> str:
    for cell, content in rows:
        path = folder / f"{cell.environment}--{cell.id}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    engines, transports = results_of(ENGINE_CELLS, folder), results_of(TRANSPORT_CELLS, folder)
    return render(read(folder), engines, transports, results_of(LOOP_CELLS, folder))


def section(page: str) -> str:
    return page.partition("## Runs over FedML's transports")[2].partition("\n## ")[0]


def test_transports_have_a_section_of_their_own(tmp_path: Path) -> None:
    page = page_of(tmp_path, [(cell, row(cell)) for cell in TRANSPORT_CELLS])
    found = section(page)
    count = len(TRANSPORT_CELLS)
    assert f"{count} of {count} cells ran, with FedML 0.9.6; commit abc; 2026-11-27." in found
    line = "| cross-silo | MQTT_S3 | fedpara | balanced | passed | 0.812 | 6.2 | 12 |"
    assert line in found.splitlines()
    assert len([one for one in found.splitlines() if "| passed |" in one]) == count
    assert "Skipped" not in found
    assert NOT_RUN not in page
    assert MISSING not in page
    assert "0 cells ran: 0 passed" in page  # they are no cells of the other tables


def test_without_them_the_page_says_how_to_run_them(tmp_path: Path) -> None:
    engine = ENGINE_CELLS[0]
    page = page_of(tmp_path, [(engine, row(engine, figures={}))])
    assert NOT_RUN in section(page)
    assert MISSING in page
    assert "Not run: `tox run -e flower-engines`" not in page


def test_skipped_and_failed_cells_are_named(tmp_path: Path) -> None:
    def came_to(cell: TransportCell) -> dict[str, Any]:
        if cell.transport == "MPI":
            return row(cell, outcome="skipped", skipped=LACKS, figures={}, seconds=0.0)
        if cell.transport == "GRPC":
            return row(cell, outcome="failed", error="no such port", figures={})
        return row(cell)

    page = page_of(tmp_path, [(cell, came_to(cell)) for cell in TRANSPORT_CELLS])
    found = section(page)
    skipped = sum(cell.transport == "MPI" for cell in TRANSPORT_CELLS)
    ran = len(TRANSPORT_CELLS) - skipped
    assert f"{ran} of {len(TRANSPORT_CELLS)} cells ran" in found
    assert f"- {skipped} of {len(TRANSPORT_CELLS)} cells: {LACKS}" in found.splitlines()
    assert "| cross-silo | GRPC | none | none | **failed** | - | - | 12 |" in found.splitlines()
    assert "| MPI |" not in found


def test_a_page_on_which_all_were_skipped(tmp_path: Path) -> None:
    cell = TRANSPORT_CELLS[0]
    page = page_of(tmp_path, [(cell, row(cell, outcome="skipped", skipped=LACKS, figures={}))])
    assert f"- 1 of {len(TRANSPORT_CELLS)} cells: {LACKS}" in section(page)
    assert "cells ran" not in section(page)


def test_training_loops_have_a_table_of_loops_by_options(tmp_path: Path) -> None:
    figures = {"off": 1.2e-8, "without": 0.987}
    tools = "lightning 2.6.6, schedulefree 1.4.1"

    def came_to(cell: Any) -> dict[str, Any]:
        outcome = "failed" if cell.id == "closure-decay" else "passed"
        return row(cell, version=tools, figures=figures, outcome=outcome)

    page = page_of(tmp_path, [(cell, came_to(cell)) for cell in LOOP_CELLS])
    found = page.partition("## Training loops")[2].partition("\n## ")[0]
    count = len(LOOP_CELLS)
    said = (
        f"{count} of {count} cells ran, {count - 1} passed, with {tools}; commit abc; 2026-11-27."
    )
    assert said in found
    spelled = LOOPS["closure"]
    came = ["**failed**" if option == "decay" else "1e-08 (0.99)" for option in LOOP_OPTIONS]
    assert f"| {spelled} | {' | '.join(came)} |" in found
    assert "Not run: `tox run -e core-loops`" not in page
    assert "- `tox run -e core-loops`:" not in page
    assert "0 cells ran: 0 passed" in page


def test_without_training_loops_the_page_says_how_to_run_them(tmp_path: Path) -> None:
    page = page_of(tmp_path, [])
    assert "Not run: `tox run -e core-loops`." in page
    assert "- `tox run -e core-loops`: needs Lightning" in page
