"""Render the cells' results as a Markdown page. Standard library only.

``python compat_tests/render.py --input build/matrix --output docs/records/compatibility.md``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from harness.cells.base import Cell
from harness.cells.engines import ENGINE_CELLS
from harness.cells.environments import ENVIRONMENTS, NOT_BY_DEFAULT
from harness.cells.fedml import FEDML, FEDML_ENVIRONMENT, fedml_cells
from harness.cells.flower import CODECS, METHODS, MODELS, cells, drift_cells
from harness.cells.loops import LOOP_CELLS
from harness.cells.strategies import PLUGIN_STRATEGIES, STRATEGIES
from harness.cells.transports import TRANSPORT_CELLS
from harness.matrix.engine_page import engine_section, of_an_engine
from harness.matrix.loop_page import loop_section, of_a_loop
from harness.matrix.page import Row, listed, results_of, table
from harness.matrix.transport_page import of_a_transport, transport_section

SPELLED = {"flower": "Flower", "fedml": "FedML"}

Results = Mapping[tuple[str, str], Row]

HEAD = """# Record of the compatibility matrix

This page lists every cell of the matrix and its result. For what works with which versions, see
[compatibility](../compatibility.md).

Every cell is a real federated run (4 or 7 clients, 2 rounds, scikit-learn's digits, a small CNN
with GroupNorm or BatchNorm). On Flower, cells run through the Grid of
[`compat_tests/harness`](../../compat_tests/harness); on FedML, they run in its single-process
simulation. Each cell has assertions that can fail:

- **The strategy's own rule** is implemented in plain torch
  ([`rules.py`](../../compat_tests/harness/oracles/rules.py) and the modules it imports). With
  codec `none` or `lossless`, the final weights equal those of that plain loop to float tolerance.
  With `int8` or `balanced`, they end within 5 % of the distance that the plain loop has moved, at
  its accuracy (Bulyan: 10 %, since it chooses coordinate by coordinate). The clients' own models
  are as accurate as those of the plain loop.
- **The ledger's bytes** equal those counted on the wire, in every round and direction, and no
  message holds more or less than what the cell shares.
- **FedML's cells** run with the plugin's engine on (`fedpara_mend: true` for method and codec
  `none`) and are compared with the published algorithms
  ([`fedml_rules.py`](../../compat_tests/harness/oracles/fedml_rules.py)). If variates, duals or
  gradients are coded too, a lossy codec may end within 10 %. [Faults of
  FedML](../fedml-faults.md) describes what FedML itself computes.
- **One truth:** FedAvg, FedProx, FedAdam and SCAFFOLD with `none`, `fedpara` and `pfedpara` reach
  the same weights on Flower, on FedML and in a plain loop. The weights are stored in [a
  file](../../compat_tests/golden/weights.safetensors)
  (`compat_tests/test_flower_golden_weights.py`, `compat_tests/test_fedml_golden_weights.py`).
- **The DP wrappers** run without noise here. Noise and bound have [tests of their
  own](../../compat_tests/test_flower_clipping.py).

The latest version runs every strategy with every method and two codecs. The other versions run
every pair of (strategy, method, codec, normalisation). `tox run` runs a smoke part of the latest
and the oldest version of Flower and of FedML, `tox run -m matrix` runs all cells, and
`tox run -e flower-latest -- -m fedadam` runs one strategy.

A cell shows:

- the codec;
- the accuracy of the server's model on its test data, with the plain loop's accuracy in brackets;
- how many times fewer bytes than the dense model both directions took together, including first
  contact and evaluation (FedML evaluates without messages);
- for `pfedpara`, whose server model is W1, "own": the mean accuracy of the clients' own models on
  their held-out images.

*refused* means that the plugin ends the run with the reason, as the cell asserts. *Flower's
error* and *FedML's error* mean that the plugin does nothing, and that the framework itself cannot
compute with this model or these keys. These cells are asserted too, so that a change shows in the
table.
"""


def main() -> None:
    """Read the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, default=Path("build/matrix"), help="folder of JSON")
    parser.add_argument("--output", type=Path, default=Path("docs/records/compatibility.md"))
    parser.add_argument("--print", action="store_true", help="write the page to the terminal too")
    options = parser.parse_args()
    folder = options.input
    engines, transports = results_of(ENGINE_CELLS, folder), results_of(TRANSPORT_CELLS, folder)
    loops = results_of(LOOP_CELLS, folder)
    page = render(read(folder), engines, transports, loops)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page, encoding="utf-8")
    if options.print:
        print(page)


def read(folder: Path) -> dict[tuple[str, str], Row]:
    """Read all results of a folder, by environment and cell."""
    found: dict[tuple[str, str], Row] = {}
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        if of_an_engine(row) or of_a_transport(row) or of_a_loop(row):
            continue
        own = {key: row[key] for key in Cell.__dataclass_fields__}
        found[row["environment"], Cell(**own).id] = row
    return found


def render(
    results: Results,
    engines: Mapping[str, Row] | None = None,
    transports: Mapping[str, Row] | None = None,
    loops: Mapping[str, Row] | None = None,
) -> str:
    """Render the page: an overview, a table for each environment that ran, and what did not run.

    Args:
        results: results of the cells without an engine.
        engines: results of the cells on Flower's engines, by cell.
        transports: results of the cells over FedML's transports, by cell.
        loops: results of the cells of training loops, by cell.
    """
    names = [*(known.name for known in ENVIRONMENTS), FEDML_ENVIRONMENT]
    ran = {environment for environment, _ in results}
    ordered = [name for name in names if name in ran] + sorted(ran - set(names))
    parts = [HEAD, _summary(results), _overview(ordered, results)]
    parts += [_section(name, results) for name in ordered]
    parts += [engine_section(engines or {}), transport_section(transports or {})]
    parts.append(loop_section(loops or {}))
    others = [*(engines or {}).values(), *(transports or {}).values(), *(loops or {}).values()]
    parts.append(_not_run(ran | {str(row["environment"]) for row in others}))
    return "\n".join(parts)


def _summary(results: Results) -> str:
    passed = [row for row in results.values() if row["outcome"] == "passed"]
    refused = sum(row["refused_by"] == "plugin" for row in passed)
    upstream = sum(row["refused_by"] in ("Flower", "FedML") for row in passed)
    return (
        f"{len(results)} cells ran: {len(passed)} passed, {len(results) - len(passed)} failed. Of "
        f"the cells that passed, {refused} are refusals by the plugin and {upstream} are errors of "
        f"the framework itself.\n"
    )


def _overview(names: Sequence[str], results: Results) -> str:
    """Render strategies by versions: how many of the existing cells passed."""
    versions = {name: _of(name, results) for name in names}
    head = ["strategy", "marker"]
    head += [
        listed(f"{SPELLED[row['framework']]} {row['version']}" for row in versions[name].values())
        for name in names
    ]
    lines = [head, ["---", "---", *["---:" for _ in names]]]
    for strategy, label in _labels().items():
        counts = [_counted(strategy, name, versions[name]) for name in names]
        lines.append([label, f"`{strategy}`", *counts])
    return f"Cells that passed, by version of Flower and of FedML:\n\n{table(lines)}\n"


def _labels(framework: str = "") -> dict[str, str]:
    """Return all optimizers by marker, under the framework's names, Flower's first."""
    flower = {name: spec.label for name, spec in {**STRATEGIES, **PLUGIN_STRATEGIES}.items()}
    fedml = {name: spec.label for name, spec in FEDML.items()}
    return {**flower, **fedml} if framework == "fedml" else {**fedml, **flower}


def _planned(name: str) -> list[Cell]:
    return fedml_cells(name) if name == FEDML_ENVIRONMENT else [*cells(name), *drift_cells(name)]


def _counted(strategy: str, name: str, own: Mapping[str, Row]) -> str:
    planned = sum(c.strategy == strategy for c in _planned(name))
    if not planned:
        return "-"
    mine = [row for row in own.values() if row["strategy"] == strategy]
    passed = sum(row["outcome"] == "passed" for row in mine)
    failed = len(mine) - passed
    return f"{passed} of {planned}" + (f", **{failed} failed**" if failed else "")


def _of(name: str, results: Results) -> dict[str, Row]:
    return {cell_id: row for (where, cell_id), row in results.items() if where == name}


def _section(name: str, results: Results) -> str:
    own = _of(name, results)
    frameworks = {row["framework"] for row in own.values()}
    versions = listed(f"{SPELLED[row['framework']]} {row['version']}" for row in own.values())
    commits = listed(row["commit"] or "no commit" for row in own.values())
    dates = listed(row["date"] for row in own.values())
    lines = [["strategy", *METHODS], ["---"] * (1 + len(METHODS))]
    labels = _labels("fedml" if frameworks == {"fedml"} else "")
    for strategy, model in product(labels, MODELS):
        label = labels[strategy] + (", BatchNorm" if model == "batchnorm" else "")
        ids = {
            method: [Cell("", "", strategy, method, codec, model).id for codec in CODECS]
            for method in METHODS
        }
        row = ["<br>".join(_cell(own[i]) for i in ids[m] if i in own) for m in METHODS]
        if any(row):
            lines.append([label, *row])
    failures = [f"- `{cell_id}`: {_short(row)}" for cell_id, row in own.items() if row["error"]]
    said = "\n".join(["\nFailures:\n", *failures, ""]) if failures else ""
    return f"## {versions} (`{name}`)\n\nCommit {commits}; {dates}.\n\n{table(lines)}\n{said}"


def _cell(row: Row) -> str:
    figures, codec = row["figures"], row["codec"]
    if row["outcome"] != "passed":
        return f"{codec}: **failed**"
    if row["refused_by"]:
        by = row["refused_by"]
        return f"{codec}: " + ("*refused*" if by == "plugin" else f"*{by}'s error*")
    own = f", own {figures['client_accuracy']:.3f}" if row["method"] == "pfedpara" else ""
    return (
        f"{codec}: {figures['accuracy']:.3f} ({figures['reference_accuracy']:.3f}), "
        f"{figures['ratio_to_dense']:.1f}x{own}"
    )


def _not_run(ran: Iterable[str]) -> str:
    reasons = {known.name: "part of `tox run -m matrix`" for known in ENVIRONMENTS}
    missing = {name: why for name, why in {**reasons, **NOT_BY_DEFAULT}.items() if name not in ran}
    lines = [f"- `tox run -e {name}`: {why}" for name, why in missing.items()]
    return "\n".join(["## Not run\n", *(lines or ["Nothing."]), ""])


def _short(row: Row) -> str:
    return " ".join(str(row["error"]).split())[:300].replace("|", "\\|")


if __name__ == "__main__":
    main()
