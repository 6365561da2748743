"""What crosses the wire: bytes counted by a TCP proxy between SuperNodes and SuperLink.

    python benchmarks/wire_bytes.py                     # VGG16, all runs: an hour on two cores
    python benchmarks/wire_bytes.py --app demo          # the app of `tox run -e demo`
    python benchmarks/wire_bytes.py --runs dense small  # some; the table holds earlier ones too
    python benchmarks/wire_bytes.py --table             # only the table

`flower-superlink`, two `flower-supernode`s and `flwr run` on loopback, in plain text. Counted is
every byte in TCP's streams: messages, polls, heartbeats, the app's bundle. Ten rounds with training
and evaluation on all clients. Training is short (four steps of SGD on digits, scaled up to 32x32
colour), but real. Needs Flower 1.40 or later, and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "compat_tests"), str(HERE.parent / "examples")]

import demo  # noqa: E402

from fedpara_plugins import Ledger  # noqa: E402
from harness.flower.deployment import app_copy, deployment  # noqa: E402
from harness.processes.wiretap import Wiretap  # noqa: E402

Row = dict[str, Any]

RUNS: dict[str, dict[str, dict[str, str]]] = {
    "vgg16": {
        "dense": {},
        "factors": {"method": "fedpara"},
        "balanced": {"method": "fedpara", "codec": "balanced", "init": "seeded"},
        "small": {"method": "fedpara", "codec": "small", "init": "seeded"},
        "balanced-own": {"method": "fedpara", "codec": "balanced", "init": "random"},
        "small-own": {"method": "fedpara", "codec": "small", "init": "random"},
        "small-fit": {"method": "fedpara", "codec": "small", "init": "fit"},
    },
    "demo": {
        "dense": {},
        "fedpara": {"method": "fedpara", "codec": "small", "init": "seeded"},
        "pfedpara": {"method": "pfedpara", "codec": "small", "init": "seeded"},
    },
}
"""By name: the options of the section ``fedpara``; what is not named is ``none``."""

OBJECTS = {"up": "push-object", "down": "pull-object"}
"""The requests whose bodies carry messages."""


def main() -> None:
    """Measure, keep the figures, print the table of all that were kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--app", choices=RUNS, default="vgg16")
    parser.add_argument("--runs", nargs="+", help="names; all if left out")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="instead of the app's own number")
    parser.add_argument("--output", type=Path, default=Path("build/wire_bytes"))
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    folder = options.output.resolve() / options.app
    folder.mkdir(parents=True, exist_ok=True)
    for name in [] if options.table else options.runs or RUNS[options.app]:
        row = measured(options.app, name, options.nodes, options.rounds, folder)
        (folder / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    found = {name: folder / f"{name}.json" for name in RUNS[options.app]}
    rows = [json.loads(path.read_text("utf-8")) for path in found.values() if path.exists()]
    print(table(rows))


def measured(app: str, name: str, nodes: int, rounds: int | None, output: Path) -> Row:
    """Return one run's figures."""
    section = {"method": "none", "codec": "none", **RUNS[app][name]}
    ledger = output / f"{name}.ledger.jsonl"
    ledger.unlink(missing_ok=True)
    config: dict[str, Any] = {f"fedpara.{key}": value for key, value in section.items()}
    config["fedpara.ledger"] = str(ledger)
    if rounds is not None:
        config["rounds" if app == "vgg16" else "num-server-rounds"] = rounds
    if app == "vgg16":
        config["clients"] = nodes
    print(f"{app}, {name}: running", flush=True)
    with tempfile.TemporaryDirectory(prefix="fedpara-wire-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        source = _vgg16_app(folder) if app == "vgg16" else demo.patched_app(folder / "app")
        start = time.monotonic()
        with deployment(folder / "run", nodes=nodes) as engine:
            finished = engine.run(source, config, seconds=3600).check()
            row = _figures(engine.tap)
            shutil.copy(engine.processes.logs / "run.log", output / f"{name}.log")
    encoded = Counter[str]()
    for entry in Ledger.read(ledger):
        encoded[entry.direction] += entry.encoded_bytes
    return {
        "app": app,
        "name": name,
        "section": section,
        "nodes": nodes,
        "rounds": finished.log.count("[ROUND "),
        "seconds": round(time.monotonic() - start),
        "commit": _commit(),
        "flower": finished.traffic,
        "encoded": encoded,
        **row,
    }


def _vgg16_app(folder: Path) -> Path:
    return app_copy(HERE / "wire_app", folder, HERE / "vgg16_update.py")


def _figures(tap: Wiretap) -> Row:
    """Return bytes by direction: all, HTTP's heads, bodies with messages, other bodies."""
    row: Row = {"total": {}, "heads": {}, "messages": {}, "rest": {}}
    for way, objects in OBJECTS.items():
        bodies = tap.http(way, "bodies")
        row["total"][way] = tap.total(way)
        row["heads"][way] = tap.http(way, "heads").total()
        row["messages"][way] = bodies.pop(objects, 0)
        row["rest"][way] = bodies.total()
    row["requests"] = dict(tap.http("up", "count"))
    return row


def table(rows: list[Row]) -> str:
    """Render the figures in Markdown, with the dense run scaled to each row's rounds."""
    dense: Row = next((row for row in rows if row["name"] == "dense"), {})
    head = (
        "method",
        "codec",
        "start",
        "rounds",
        "MB up",
        "MB down",
        "times below dense",
        "by Flower's count",
        "share of payloads",
        "share of Flower's framing",
        "share of HTTP headers",
        "share of polls, heartbeats, app",
    )
    lines = [head, ("---", "---", "---", *["---:"] * (len(head) - 3))]
    for row in rows:
        section, total = row["section"], _sum(row["total"])
        encoded, objects = _sum(row["encoded"]), _sum(row["messages"])
        share = row["rounds"] / dense["rounds"] if dense else 0.0
        parts = (encoded, objects - encoded, _sum(row["heads"]), _sum(row["rest"]))
        lines.append(
            (
                section["method"],
                section["codec"],
                section.get("init", "random"),
                str(row["rounds"]),
                *(f"{row['total'][way] / 1e6:.2f}" for way in ("up", "down")),
                f"{share * _sum(dense['total']) / total:.1f}" if dense else "?",
                f"{share * dense['flower'] / row['flower']:.1f}" if dense else "?",
                *(f"{part / total:.1%}" for part in parts),
            )
        )
    said = {f"{row['nodes']} clients, commit {row['commit']}" for row in rows}
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{'; '.join(sorted(said))}"


def _sum(by_direction: dict[str, int]) -> int:
    return sum(by_direction.values())


def _commit() -> str:
    command = ["git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
