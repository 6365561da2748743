"""Runs that are killed: a program that forks one whole federated run for each line on its input.

A line is JSON of an `Order`. Forking makes a start cheap, since torch and Flower are imported once.
"""

from __future__ import annotations

import json
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
    """One run.

    Attributes:
        output: gets the global state at the end (safetensors); its log lies beside it.
        section: the options of the plugin.
        strategy: a name in `harness.cells.STRATEGIES`, or of a class of the plugin.
        options: of its constructor.
        rounds: of the run.
        epochs: of a client in a round.
        die_before: the process kills itself when the first training message of this round leaves
            the server; 0 for never.
        die_after: it kills itself a moment after this many messages, in any direction; 0 for never.
        moment: seconds.
    """

    output: str
    section: Mapping[str, Any]
    strategy: str = "fedavg"
    options: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 4
    epochs: int = 1
    die_before: int = 0
    die_after: int = 0
    moment: float = 0.0


class Program:
    """The program, from outside."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.mortal"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "OMP_NUM_THREADS": "1",
            },
        )

    def run(self, order: Order) -> dict[str, Tensor] | None:
        """The global state at the end; None if the run was killed."""
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
    import fedpara_plugins_flower
    from harness.apps import Experiment, federate, plugin_apps
    from harness.cells import STRATEGIES
    from harness.drift_apps import DriftExperiment, drift_apps
    from harness.inprocess_grid import InProcessGrid, Sent
    from harness.task import Task

    def run(order: Order) -> None:
        def tap(sent: Sent, grid: InProcessGrid) -> None:
            if len(grid.sent) == order.die_after:
                threading.Timer(order.moment, _die).start()
            if (sent.kind, sent.direction, sent.round) == ("train", "down", order.die_before):
                _die()

        task = Task(rounds=order.rounds, epochs=order.epochs)
        options = dict(order.options)
        if order.strategy in STRATEGIES:
            apps = plugin_apps(Experiment(task, order.strategy, options))
        else:
            kind = getattr(fedpara_plugins_flower, order.strategy)
            apps = drift_apps(DriftExperiment(kind, options, task))
        outcome = federate(apps, order.section, tap=tap)
        Path(order.output).with_suffix(".log").write_text("\n".join(outcome.log))
        save_file({k: v.contiguous() for k, v in outcome.state.items()}, order.output)

    for line in sys.stdin:
        order = Order(**json.loads(line))
        child = os.fork()
        if not child:
            status = 1
            try:
                run(order)
                status = 0
            except BaseException as error:
                Path(order.output).with_suffix(".log").write_text(repr(error))
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _main()
