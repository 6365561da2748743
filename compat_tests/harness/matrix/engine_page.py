"""The part of the page about runs on Flower's engines. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from harness.cells.engines import ENGINE_CELLS
from harness.matrix.page import Row, listed, table

__all__ = ["engine_section", "of_an_engine"]

HEAD = """## Runs on Flower's engines

Each run is FedAvg with two rounds through `flwr run`: in deployment as real processes on loopback
(SuperLink, SuperNodes), in simulation on Ray, with the model of the other cells. With codec
`none`, the final weights equal those of the plain loop to float tolerance. With `balanced`, they
end within 5 % of the distance that the plain loop has moved. A proxy between SuperNodes and
SuperLink counts the bytes, including HTTP. They contain what the ledger states and, beside that
and the HTTP headers, at most 3 kB per message.
"""

EMPTY = "Not run: `tox run -e flower-engines`.\n"


def of_an_engine(row: Row) -> bool:
    """Tell whether a result belongs to an `EngineCell`."""
    return "engine" in row


def engine_section(rows: Mapping[str, Row]) -> str:
    """Render a table of the engine runs."""
    if not rows:
        return f"{HEAD}\n{EMPTY}"
    version, commit, date = (
        listed(row[key] for row in rows.values()) for key in ("version", "commit", "date")
    )
    said = (
        f"{len(rows)} of {len(ENGINE_CELLS)} cells ran, with Flower {version}; commit {commit}; "
        f"{date}."
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
    return f"{HEAD}\n{said}\n\n{table(lines)}\n"


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
