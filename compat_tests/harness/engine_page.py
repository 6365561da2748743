"""The part of the page about runs on Flower's engines. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.engine_cells import ENGINE_CELLS

__all__ = ["engine_results", "engine_section", "of_an_engine"]

Row = Mapping[str, Any]

HEAD = """## Runs on Flower's engines

FedAvg, two rounds, through `flwr run`: in deployment as real processes on loopback (SuperLink,
SuperNodes), in simulation on Ray; the model of the other cells. With codec `none` the final weights
equal the plain loop's to float tolerance, with `balanced` they end within 5 % of its way. Bytes are
those that a proxy counted between SuperNodes and SuperLink, HTTP included; what the ledger says has
passed there, and no more than 3 kB a message beside it and HTTP's heads.
"""

EMPTY = "Not run: `tox run -e flower-engines`.\n"


def of_an_engine(row: Row) -> bool:
    """Whether a result is that of an `EngineCell`."""
    return "engine" in row


def engine_results(folder: Path) -> dict[str, Row]:
    """All results of engine cells in a folder, by cell."""
    found: dict[str, Row] = {}
    for cell in ENGINE_CELLS:
        path = folder / f"{cell.environment}--{cell.id}.json"
        if path.exists():
            found[cell.id] = json.loads(path.read_text(encoding="utf-8"))
    return found


def engine_section(rows: Mapping[str, Row]) -> str:
    """A table of them."""
    if not rows:
        return f"{HEAD}\n{EMPTY}"
    said = (
        f"{len(rows)} of {len(ENGINE_CELLS)} cells ran, with Flower "
        f"{_listed(rows, 'version')}; commit {_listed(rows, 'commit')}; {_listed(rows, 'date')}."
    )
    head = (
        "engine",
        "variant",
        "method",
        "codec",
        "outcome",
        "loss (plain loop)",
        "times below dense (ledger)",
        "bytes on the wire",
        "s",
    )
    lines = [head, ("---",) * 5 + ("---:",) * 4, *(_line(row) for row in rows.values())]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{HEAD}\n{said}\n\n{table}\n"


def _line(row: Row) -> tuple[str, ...]:
    figures = row["figures"]
    loss = ratio = wire = "-"
    if "loss" in figures:
        loss = f"{figures['loss']:.4f} ({figures['reference_loss']:.4f})"
        ratio = f"{figures['ratio_to_dense']:.1f}"
    if "wire_bytes" in figures:
        wire = f"{figures['wire_bytes']:,}"
    outcome = row["outcome"] if row["outcome"] == "passed" else "**failed**"
    names = (row[key] for key in ("engine", "variant", "method", "codec"))
    return (*names, outcome, loss, ratio, wire, f"{row['seconds']:.0f}")


def _listed(rows: Mapping[str, Row], key: str) -> str:
    return ", ".join(sorted({row[key] for row in rows.values()}))
