"""The part of the page about training loops. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from harness.cells.loops import LOOP_CELLS, LOOP_OPTIONS, LOOPS
from harness.matrix.page import Row, listed, table

__all__ = ["loop_section", "of_a_loop"]

HEAD = """## Training loops

Each cell trains a small net of two factorised layers in float64, by one kind of loop, with one
option that acts on optimizer steps (or with FedDyn's correction). The weights at the end equal
those of plain steps in which the option is written out
([`plain_steps.py`](../../compat_tests/harness/oracles/plain_steps.py)). A cell shows the distance
from them, and in brackets the distance from the same steps without the option, both relative to the
way that the weights went.
"""

EMPTY = "Not run: `tox run -e core-loops`.\n"


def of_a_loop(row: Row) -> bool:
    """Tell whether a result belongs to a `LoopCell`."""
    return "loop" in row


def loop_section(rows: Mapping[str, Row]) -> str:
    """Render a table of loops by options."""
    if not rows:
        return f"{HEAD}\n{EMPTY}"
    passed = sum(row["outcome"] == "passed" for row in rows.values())
    versions, commit, date = (
        listed(row[key] or "none" for row in rows.values()) for key in ("version", "commit", "date")
    )
    said = (
        f"{len(rows)} of {len(LOOP_CELLS)} cells ran, {passed} passed, with {versions}; commit "
        f"{commit}; {date}."
    )
    lines = [("loop", *LOOP_OPTIONS), ("---",) * (1 + len(LOOP_OPTIONS))]
    for loop, spelled in LOOPS.items():
        found = [rows.get(f"{loop}-{option}") for option in LOOP_OPTIONS]
        if any(found):
            lines.append((spelled, *(_cell(row) for row in found)))
    return f"{HEAD}\n{said}\n\n{table(lines)}\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["outcome"] != "passed":
        return "**failed**"
    return f"{row['figures']['off']:.0e} ({row['figures']['without']:.2f})"
