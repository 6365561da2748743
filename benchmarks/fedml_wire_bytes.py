"""What crosses the wire between FedML's processes: bytes counted by TCP proxies, over gRPC.

    python benchmarks/fedml_wire_bytes.py                # all runs: some 20 minutes on two cores
    python benchmarks/fedml_wire_bytes.py --runs small   # one; the table holds earlier ones too
    python benchmarks/fedml_wire_bytes.py --table        # only the table

A server and two clients in cross-silo mode, a proxy before each of the three. Counted is every byte
of TCP's streams: FedML's pickles, HTTP/2, the plugin's hellos and signs of life, and FedML's first
model, which it sends again for every client that comes. ``dense`` is FedML's own run, without the
plugin. Training is short (four steps of SGD on digits, scaled up to 32x32 colour), but real.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "compat_tests")]

from fedpara_plugins import Ledger  # noqa: E402
from harness.fedml.deployment import FedMLDeployment  # noqa: E402

Row = dict[str, Any]

VGG16 = {"method": "fedpara", "gamma": 0.1, "init": "seeded", "exclude": "0,45,47,49"}
"""As in the paper: stem and linear layers stay dense."""

RUNS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "balanced": {**VGG16, "codec": "balanced"},
    "small": {**VGG16, "codec": "small"},
}
"""By name: keys of the plugin; None is FedML alone."""


def main() -> None:
    """Measure, keep the figures, print the table of all that were kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("build/fedml_wire_bytes"))
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in [] if options.table else options.runs:
        print(f"{name}: running", flush=True)
        row = measured(name, options.clients, options.rounds)
        (options.output / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n", "utf-8")
    paths = [options.output / f"{name}.json" for name in RUNS]
    print(table([json.loads(path.read_text("utf-8")) for path in paths if path.exists()]))


def measured(name: str, clients: int, rounds: int) -> Row:
    """Return one run's figures."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedpara-wire-", ignore_cleanup_errors=True) as text:
        engine = FedMLDeployment(
            Path(text),
            "GRPC",
            clients=clients,
            plugin=RUNS[name],
            train={"comm_round": rounds},
            tap=True,
            app=HERE / "fedml_wire_app" / "main.py",
        )
        with engine:
            engine.start_all()
            codes = engine.wait(3600)
            if any(codes.values()):
                raise RuntimeError(f"{codes}\n{engine.programs['server'].tail()}")
            passed = {way: _total(engine, way) for way in ("up", "down")}
            encoded = Counter[str]()
            if engine.ledger.exists():
                for entry in Ledger.read(engine.ledger):
                    encoded[entry.direction] += entry.encoded_bytes
    return {
        "name": name,
        "plugin": RUNS[name] or {},
        "clients": clients,
        "rounds": rounds,
        "seconds": round(time.monotonic() - start),
        "commit": _commit(),
        "bytes": passed,
        "encoded": encoded,
    }


def _total(engine: FedMLDeployment, way: str) -> int:
    """Count bytes to the server (``up``) or from it, whoever opened the connection."""
    other = {"up": "down", "down": "up"}[way]
    taps = {} if engine.wire is None else engine.wire.taps
    return sum(tap.total(other if rank else way) for rank, tap in taps.items())


def table(rows: list[Row]) -> str:
    """Render the figures in Markdown, with the dense run scaled to each row's rounds."""
    dense = next((row for row in rows if row["name"] == "dense"), None)
    head = (
        "method", "codec", "start", "rounds", "MB up", "MB down", "times below dense",
        "share of the plugin's messages",
    )  # fmt: skip
    lines = [head, ("---", "---", "---", *["---:"] * 5)]
    for row in rows:
        plugin, total = row["plugin"], sum(row["bytes"].values())
        share = row["rounds"] / dense["rounds"] if dense else 0.0
        encoded = sum(row["encoded"].values())
        lines.append(
            (
                plugin.get("method", "FedML alone"),
                plugin.get("codec", ""),
                plugin.get("init", "random"),
                str(row["rounds"]),
                *(f"{row['bytes'][way] / 1e6:.2f}" for way in ("up", "down")),
                f"{share * sum(dense['bytes'].values()) / total:.1f}" if dense else "?",
                f"{encoded / total:.1%}" if encoded else "",
            )
        )
    said = {f"{row['clients']} clients, commit {row['commit']}" for row in rows}
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{'; '.join(sorted(said))}"


def _commit() -> str:
    command = ["git", "-C", str(HERE), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
