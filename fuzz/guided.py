"""The coverage-guided engine: atheris (libFuzzer) with a mutator that repairs the checksum.

Started by ``run.py``; arguments are libFuzzer's. The last line of its output says how many inputs
were checked, decoded and refused.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import threading
from pathlib import Path

import atheris
import torch

READERS = ("codecs", "spec", "own_state", "references", "ledger", "traffic", "inspector")

with atheris.instrument_imports(include=[f"fedpara_plugins.{name}" for name in READERS]):
    import fedpara_plugins.inspector
    import fedpara_plugins.references
    import fedpara_plugins.traffic  # noqa: F401  (instrumented before invariant.py imports them)

from invariant import Checker  # noqa: E402

from fedpara_plugins.testing.hostile import damaged, signed  # noqa: E402

REPORT_EVERY = 1000


def main() -> None:
    """Fuzz until libFuzzer's limits are reached."""
    torch.set_num_threads(1)
    logging.disable()  # thousands of torn ledgers
    folder = tempfile.TemporaryDirectory()
    checker = Checker(Path(folder.name))

    def report() -> None:
        os.write(1, f"CHECKED {checker.decoded} {checker.refused}\n".encode())

    def check(data: bytes) -> None:
        checker.check(data)
        if (checker.decoded + checker.refused) % REPORT_EVERY == 0:
            report()

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        kind = draw.random()
        if kind < 0.7:
            changed = damaged(data, draw)
        elif kind < 0.85:
            changed = signed(atheris.Mutate(data, len(data) + 64))
        else:  # the body alone, so that what parses the table lets it through
            start = 8 + int.from_bytes(data[:8], "little")
            body = atheris.Mutate(data[start:], max(1, len(data) - start)) if data[start:] else b""
            changed = signed(data[:start] + body)
        return changed[:max_size]

    assert threading.active_count() == 1
    atheris.Setup(sys.argv, check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
