"""The coverage-guided engine: atheris (libFuzzer) with a mutator that repairs the checksum.

Started by ``run.py``; arguments are libFuzzer's, the folder for findings stands in the environment.
The last line of its output says how many inputs were decoded, refused, and findings. A finding does
not end the run, but a crash or an input that takes too long does.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import atheris
import torch

READERS = ("codecs", "stages", "models", "references", "ledger", "cli.inspect_file")
MESSAGES = ("messages",)

with atheris.instrument_imports(
    include=[
        *(f"fedpara_plugins.{name}" for name in READERS),
        *(f"fedpara_plugins_fedml.{name}" for name in MESSAGES),
    ]
):
    # Instrumented before invariant.py imports them.
    import fedpara_plugins.cli.inspect_file
    import fedpara_plugins.ledger.page  # noqa: F401
    import fedpara_plugins_fedml.messages.envelope
    import fedpara_plugins_fedml.messages.head  # noqa: F401


from envelopes import is_envelope  # noqa: E402
from invariant import Checker, damaged  # noqa: E402

from fedpara_plugins.testing import signed  # noqa: E402
from fedpara_plugins_fedml.messages import hostile as messages  # noqa: E402

REPORT_EVERY = 1000


def main() -> None:
    """Fuzz until libFuzzer's limits are reached."""
    torch.set_num_threads(1)
    logging.disable()  # thousands of torn ledgers
    folder = tempfile.TemporaryDirectory()
    checker = Checker(Path(folder.name))

    findings = Path(os.environ["FUZZ_FINDINGS"])
    tried = found = 0

    def check(data: bytes) -> None:
        nonlocal tried, found
        tried += 1
        try:
            checker.check(data)
        except Exception:
            found += 1
            path = findings / hashlib.sha256(data).hexdigest()[:16]
            path.write_bytes(data)
            os.write(2, f"FINDING {path}\n{traceback.format_exc(limit=-6)}\n".encode())
        if tried % REPORT_EVERY == 0:
            os.write(1, f"CHECKED {checker.decoded} {checker.refused} {found}\n".encode())

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        kind = draw.random()
        if kind < 0.7:
            changed = damaged(data, draw)
        elif is_envelope(data):
            changed = messages.signed(atheris.Mutate(data, len(data) + 64), sizes=kind > 0.85)
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
