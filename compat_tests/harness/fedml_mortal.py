"""FedML runs that are killed: a program that forks one whole run for each line on its input.

A line is JSON of an `Order`. Forking makes a start cheap, since torch and FedML are imported once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Order", "Program"]


@dataclass(frozen=True)
class Order:
    """One run in the single process.

    Attributes:
        output: gets the server's state at the end (safetensors); its log lies beside it.
        keys: of the YAML.
        die_before: the process kills itself when the first message of this round leaves the
            server; 0 for never.
        die_after: it kills itself a moment after this many messages, in any direction; 0 for never.
        moment: seconds.
    """

    output: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    die_before: int = 0
    die_after: int = 0
    moment: float = 0.0


class Program:
    """The program, from outside."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.fedml_mortal"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "OMP_NUM_THREADS": "1",
            },
        )
        assert self._process.stdout is not None
        while self._process.stdout.readline() not in ("ready\n", ""):
            pass  # what FedML prints

    def run(self, order: Order) -> dict[str, Tensor] | None:
        """The server's state at the end; None if the run was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        if code == -signal.SIGKILL:
            return None
        assert code == 0, Path(order.output).with_suffix(".log").read_text()
        return load_file(order.output)

    def end(self) -> None:
        """End the program."""
        self._process.communicate()


def _main() -> None:
    from harness.fedml_project import Sent, arguments, run

    arguments()  # once, before any fork

    def once(order: Order) -> None:
        logging.basicConfig(
            filename=Path(order.output).with_suffix(".log"), level=logging.INFO, force=True
        )
        count = 0

        def tap(sent: Sent) -> bytes:
            nonlocal count
            count += 1
            if count == order.die_after:
                threading.Timer(order.moment, _die).start()
            if (sent.direction, sent.round) == ("down", order.die_before):
                _die()
            return sent.data

        save_file(run(tap=tap, **order.keys).state, order.output)

    print("ready", flush=True)
    for line in sys.stdin:
        order = Order(**json.loads(line))
        child = os.fork()
        if not child:
            status = 1
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # FedML prints
            try:
                once(order)
                status = 0
            except BaseException:
                logging.exception("the run failed")
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _main()
