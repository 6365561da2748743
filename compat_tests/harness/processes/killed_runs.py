"""Federated runs that are killed, on any framework, and assertions about what they leave.

A fork server forks one whole run for each line on its input, the JSON of a `RunRequest`. Forking
makes a start cheap, since torch and the framework are imported once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedpara_plugins import Ledger

__all__ = ["ForkServer", "Killer", "RunRequest", "assert_equal", "assert_little_repeated", "serve"]


@dataclass(frozen=True)
class RunRequest:
    """One run; each framework adds what it needs.

    Attributes:
        output: file for the global state at the end (safetensors); the log lies beside it.
        die_before: round whose first training message kills the process; 0 for never.
        die_after: number of messages, in any direction, after which the process kills itself; 0
            for never.
        moment: seconds between that message and the kill.
    """

    output: str
    die_before: int = field(default=0, kw_only=True)
    die_after: int = field(default=0, kw_only=True)
    moment: float = field(default=0.0, kw_only=True)

    @property
    def log(self) -> Path:
        """Return the path of the run's log."""
        return Path(self.output).with_suffix(".log")


class ForkServer:
    """A process that forks runs, seen from outside.

    Args:
        module: the module that runs there; it calls `serve`.
    """

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
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
            pass  # what the framework prints

    def run(self, request: RunRequest) -> dict[str, Tensor] | None:
        """Run a request, and return the global state at the end; None if the run was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(request)) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        if code == -signal.SIGKILL:
            return None
        assert code == 0, request.log.read_text()
        return load_file(request.output)

    def end(self) -> None:
        """End the program."""
        self._process.communicate()


# In the program

AnyRequest = TypeVar("AnyRequest", bound=RunRequest)


def serve(kind: type[AnyRequest], run: Callable[[AnyRequest], None]) -> None:
    """Fork a run for each request on the standard input, and write its exit code.

    Args:
        kind: class of the requests.
        run: carries out a request, and writes its output and its log.
    """
    print("ready", flush=True)
    for line in sys.stdin:
        request = kind(**json.loads(line))
        child = os.fork()
        if not child:
            status = 1
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it is not for what a framework prints
            try:
                run(request)
                status = 0
                Killer.wait_for_kills()
            except BaseException:
                with request.log.open("a") as log:
                    traceback.print_exc(file=log)
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


class Killer:
    """Kills this process when a request says so; told of each message of the run."""

    _timers: ClassVar[list[threading.Timer]] = []

    def __init__(self, request: RunRequest) -> None:
        self._request = request
        self._messages = 0

    def passes(self, *, trains_in: int) -> None:
        """Take note that a message passes.

        Args:
            trains_in: the round in which it asks a client to train; 0 for other messages.
        """
        self._messages += 1
        if self._messages == self._request.die_after:
            self._timers.append(threading.Timer(self._request.moment, _die))
            self._timers[-1].start()
        if trains_in and trains_in == self._request.die_before:
            _die()

    @classmethod
    def wait_for_kills(cls) -> None:
        """Wait for kills that are due: a run is killed even if it ends before, on any machine."""
        for timer in cls._timers:
            timer.join()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# What they leave

State = Mapping[str, Any]


def assert_equal(one: State | None, other: State | None) -> None:
    """Assert that two runs ended with the same tensors, up to rounding."""
    assert one is not None
    assert other is not None
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-6, rtol=0, msg=name)


def assert_little_repeated(
    killed: State | None, whole: State | None, ledger: Path, rounds: int
) -> None:
    """Assert that only repeated rounds differ: a client killed after its reply trains twice.

    Args:
        killed: the state at the end of a run that was killed at some moments.
        whole: the state at the end of a run that was not.
        ledger: ledger of the killed run.
        rounds: rounds of each run.
    """
    assert killed is not None
    assert whole is not None
    apart = sum(float((killed[name] - value).square().sum()) for name, value in whole.items())
    start = sum(float(value.square().sum()) for value in whole.values())
    assert apart < 0.05 * start
    written = [entry.round for entry in Ledger.read(ledger)]
    assert set(written) == set(range(1, rounds + 1))
    assert written == sorted(written)
