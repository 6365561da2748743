"""Render the cells' results as a Markdown page. Standard library only.

``python compat_tests/render.py --input build/matrix --output docs/compatibility.md``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.cells import (
    CODECS,
    ENVIRONMENTS,
    METHODS,
    NOT_BY_DEFAULT,
    STRATEGIES,
    Cell,
    cells,
)

Row = Mapping[str, Any]
Results = Mapping[tuple[str, str], Row]

HEAD = """# What is verified

Every cell is a real federated run (4 clients, 3 rounds, scikit-learn's digits, a small CNN with
GroupNorm or BatchNorm) through the Grid of [`compat_tests/harness`](../compat_tests/harness), with
assertions that can fail: with codec `none` the final weights equal a plain loop in torch to float
tolerance; with `int8` they end within 5 % of the way that loop has gone, at its accuracy; bytes of
the ledger equal those counted on the wire, in every round and direction.

In a cell: outcome, accuracy of the server's model on its test data (the plain loop's in brackets),
and how many times fewer bytes than the dense model both directions took together, first contact and
evaluation included. For `pfedpara` the server's model is W1, and "own" is the mean accuracy of the
clients' own models on their held-out images.
"""


def main() -> None:
    """Read the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, default=Path("build/matrix"), help="folder of JSON")
    parser.add_argument("--output", type=Path, default=Path("docs/compatibility.md"))
    parser.add_argument("--print", action="store_true", help="write the page to the terminal too")
    options = parser.parse_args()
    page = render(read(options.input))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page, encoding="utf-8")
    if options.print:
        print(page)


def read(folder: Path) -> dict[tuple[str, str], Row]:
    """All results of a folder by environment and cell."""
    found: dict[tuple[str, str], Row] = {}
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        own = {key: row[key] for key in Cell.__dataclass_fields__}
        found[row["environment"], Cell(**own).id] = row
    return found


def render(results: Results) -> str:
    """The page: a table for each environment that ran, then what did not run and why."""
    names = [known.name for known in ENVIRONMENTS]
    ran = {environment for environment, _ in results}
    ordered = [name for name in names if name in ran] + sorted(ran - set(names))
    parts = [HEAD, _summary(results)]
    parts += [_section(name, results) for name in ordered]
    parts.append(_not_run(ran))
    return "\n".join(parts)


def _summary(results: Results) -> str:
    outcomes = [row["outcome"] for row in results.values()]
    passed, failed = outcomes.count("passed"), len(outcomes) - outcomes.count("passed")
    return f"{len(outcomes)} cells ran: {passed} passed, {failed} failed.\n"


def _section(name: str, results: Results) -> str:
    own = {cell_id: row for (where, cell_id), row in results.items() if where == name}
    versions = _listed(f"{row['framework'].capitalize()} {row['version']}" for row in own.values())
    commits = _listed(row["commit"] or "no commit" for row in own.values())
    dates = _listed(row["date"] for row in own.values())
    columns = [(method, codec) for method in METHODS for codec in CODECS]
    head = ["strategy", *(f"{method} / {codec}" for method, codec in columns)]
    lines = [head, ["---"] * len(head)]
    for strategy, model in _rows(name):
        label = STRATEGIES[strategy].class_name + (", BatchNorm" if model == "batchnorm" else "")
        known = {cell.id for cell in cells(name)}
        row = [label]
        for method, codec in columns:
            cell = Cell("flower", name, strategy, method, codec, model)
            row.append(_cell(own.get(cell.id), planned=cell.id in known))
        lines.append(row)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    failures = [f"- `{cell_id}`: {_short(row)}" for cell_id, row in own.items() if row["error"]]
    said = "\n".join(["\nFailures:\n", *failures, ""]) if failures else ""
    return f"## {versions} (`{name}`)\n\nCommit {commits}; {dates}.\n\n{table}\n{said}"


def _rows(name: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys((cell.strategy, cell.model) for cell in cells(name)))


def _cell(row: Row | None, *, planned: bool) -> str:
    if row is None:
        return "not run" if planned else "-"
    figures = row["figures"]
    parts = [row["outcome"] if row["outcome"] == "passed" else "**failed**"]
    if "accuracy" in figures:
        parts.append(f"{figures['accuracy']:.3f} ({figures['reference_accuracy']:.3f})")
        parts.append(f"{figures['ratio_to_dense']:.1f}x")
        if row["method"] == "pfedpara":
            parts.append(f"own {figures['client_accuracy']:.3f}")
    return ", ".join(parts)


def _not_run(ran: Iterable[str]) -> str:
    reasons = {known.name: known.why_not or "no results" for known in ENVIRONMENTS}
    missing = {name: why for name, why in {**reasons, **NOT_BY_DEFAULT}.items() if name not in ran}
    lines = [f"- `tox run -e {name}`: {why}" for name, why in missing.items()]
    return "\n".join(["## Not run\n", *(lines or ["Nothing."]), ""])


def _short(row: Row) -> str:
    return " ".join(str(row["error"]).split())[:300].replace("|", "\\|")


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


if __name__ == "__main__":
    main()
