"""Studies of federated runs on real data: accuracy against bytes.

    python benchmarks/study --list
    python benchmarks/study --table finetuning --data FOLDER     # does the runs that are missing
    python benchmarks/study --table finetuning --print           # runs nothing

The runs take place in this process, over the exchange, the payloads and the references that the
adapters use. Results are JSON lines in docs/results/TABLE.jsonl, from which the table is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sitting import Sitting
from tables import TABLES

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run a table's settings, or print what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", choices=[*TABLES])
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "study")
    parser.add_argument("--only", default="", help="runs whose name contains this text")
    parser.add_argument("--seeds", type=int, nargs="*", help="instead of the table's own")
    parser.add_argument("--rounds", type=int, help="at most, to try a table out")
    parser.add_argument("--list", action="store_true", help="print the tables and what they cost")
    parser.add_argument("--print", action="store_true", dest="show", help="run nothing")
    chosen = parser.parse_args()
    if chosen.list or chosen.table is None:
        for name, table in TABLES.items():
            print(f"{name}: {len(table.settings())} runs. {table.about}")
        return
    torch.set_num_threads(1)
    settings = TABLES[chosen.table].settings(chosen.seeds, chosen.rounds)
    settings = [s for s in settings if chosen.only in s.name]
    results = chosen.results / f"{chosen.table}.jsonl"
    if not chosen.show:
        if chosen.data is None:
            parser.error("give the folder of the data sets with --data FOLDER, or --print")
        Sitting(settings, chosen.data, results, chosen.models).run()
    print(TABLES[chosen.table].show(settings, results))


if __name__ == "__main__":
    main()
