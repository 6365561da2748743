"""The part of the page about runs over FedML's transports. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from harness.cells.transports import TRANSPORT_CELLS
from harness.matrix.page import Row, listed, table

__all__ = ["of_a_transport", "transport_section"]

HEAD = """## Runs over FedML's transports

Each run is FedAvg with four rounds, with a server and two client processes on loopback.
Cross-silo runs use each transport, with mosquitto and an S3-compatible store for `MQTT_S3`. MPI
simulation runs under `mpirun` with five data silos, of which two take part in a round. The
project is [`examples/fedml_cross_silo`](../../examples/fedml_cross_silo). The server's final
weights equal those of the same run in one process, bit for bit. The accuracy is that of the
server's model on held-out images (for `pfedpara`, this model is W1 alone).
"""

EMPTY = "Not run: `tox run -e fedml-engines`.\n"


def of_a_transport(row: Row) -> bool:
    """Tell whether a result belongs to a `TransportCell`."""
    return "transport" in row


def transport_section(rows: Mapping[str, Row]) -> str:
    """Render a table of the runs, and the reasons for those that did not run."""
    if not rows:
        return f"{HEAD}\n{EMPTY}"
    ran = {name: row for name, row in rows.items() if row["outcome"] != "skipped"}
    parts = [HEAD]
    if ran:
        version, commit, date = (
            listed(row[key] or "none" for row in ran.values())
            for key in ("version", "commit", "date")
        )
        parts.append(
            f"{len(ran)} of {len(TRANSPORT_CELLS)} cells ran, with FedML {version}; commit "
            f"{commit}; {date}.\n"
        )
        parts.append(_table(ran))
    if reasons := _reasons(rows):
        parts.append("\n".join(["Skipped:\n", *reasons, ""]))
    return "\n".join(parts)


def _table(rows: Mapping[str, Row]) -> str:
    names = ("mode", "transport", "method", "codec", "outcome")
    figures = ("accuracy", "times below dense (ledger)", "s")
    ruler = ("---",) * len(names) + ("---:",) * len(figures)
    lines = [(*names, *figures), ruler, *(_line(row) for row in rows.values())]
    return f"{table(lines)}\n"


def _line(row: Row) -> tuple[str, ...]:
    figures = row["figures"]
    accuracy = f"{figures['accuracy']:.3f}" if "accuracy" in figures else "-"
    ratio = f"{figures['ratio_to_dense']:.1f}" if "ratio_to_dense" in figures else "-"
    outcome = "passed" if row["outcome"] == "passed" else "**failed**"
    mode = str(row["mode"]).replace("_", "-")
    names = (mode, row["transport"], row["method"], row["codec"], outcome)
    return (*names, accuracy, ratio, f"{row['seconds']:.0f}")


def _reasons(rows: Mapping[str, Row]) -> list[str]:
    """Render a line for each reason, with the number of cells."""
    counts: dict[str, int] = {}
    for row in rows.values():
        if row["outcome"] == "skipped":
            counts[row["skipped"]] = counts.get(row["skipped"], 0) + 1
    return [
        f"- {count} of {len(TRANSPORT_CELLS)} cells: {reason}" for reason, count in counts.items()
    ]
