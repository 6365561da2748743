"""Programs of an engine, started for one test and certainly ended.

Flower's programs start others, some of them in sessions of their own. Each carries a mark in its
environment, by which all are found and ended by their own ids, whatever their parent is.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO
from uuid import uuid4

__all__ = ["Processes", "Program", "free_ports", "wait_until"]

MARK = "FEDPARA_ENGINE_TEST"
GRACE = 10.0
"""Seconds that a program has to end by itself when it is asked to."""

QUIET: Mapping[str, str] = {
    # Otherwise Flower installs the app's dependencies afresh, and gigabytes of CUDA with them.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


class Program:
    """One program that runs, its output going to a file.

    Attributes:
        name: name in messages, and of the log file.
        log: the file.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path, start: int) -> None:
        self.name = name
        self.log = log
        self._process = process
        self._start = start

    @property
    def text(self) -> str:
        """Return what it has printed so far, without colours."""
        printed = self.log.read_bytes()[self._start :].decode("utf-8", errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", printed)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Tell whether it still runs."""
        return self._process.poll() is None

    def wait(self, seconds: float) -> int:
        """Wait for its end.

        Raises:
            TimeoutError: it goes on; the message ends with what it printed last.
        """
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"{self.name} still runs after {seconds:.0f} s; it printed last:\n{self.tail()}"
            ) from None

    def kill(self) -> None:
        """Kill it at once, with all of its process group (SIGKILL: no clean-up)."""
        self.send(signal.SIGKILL)
        self._process.wait(GRACE)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and to its process group, if it still runs."""
        if self.running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def tail(self, lines: int = 60) -> str:
        """Return the last lines of its output."""
        return "\n".join(self.text.splitlines()[-lines:])


class Processes:
    """A context in which programs run; at its end none of them does.

    Args:
        folder: a fresh one. It gets ``flwr-home`` (Flower's settings), ``empty`` (the working
            directory: Flower imports from there) and ``logs``.
        env: further environment variables.
    """

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.home = folder / "flwr-home"
        self.logs = folder / "logs"
        self._cwd = folder / "empty"
        for needed in (self.home, self.logs, self._cwd):
            needed.mkdir(parents=True)
        self._mark = uuid4().hex
        scripts = str(Path(sys.executable).parent)
        self.env = {
            **os.environ,
            **QUIET,
            "FLWR_HOME": str(self.home),
            "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),
            MARK: self._mark,
            **(env or {}),
        }
        self._programs: list[Program] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def start(self, name: str, *command: str) -> Program:
        """Start a program in a process group of its own.

        Args:
            name: name of its log file; another program of that name continues the same file.
            command: its name, looked up beside this Python first, and arguments.
        """
        found = shutil.which(command[0], path=self.env["PATH"])
        if found is None:
            raise FileNotFoundError(f"{command[0]} is not installed beside {sys.executable}")
        log = self.logs / f"{name}.log"
        stream: IO[bytes]
        with log.open("ab") as stream:
            start = stream.tell()
            process = subprocess.Popen(
                [found, *command[1:]],
                cwd=self._cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        program = Program(name, process, log, start)
        self._programs.append(program)
        return program

    def run(self, name: str, *command: str, seconds: float) -> str:
        """Run a program to its end, and return what it printed.

        Raises:
            RuntimeError: it ended with another code than 0.
            TimeoutError: it did not end in time.
        """
        program = self.start(name, *command)
        if code := program.wait(seconds):
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{program.tail()}")
        return program.text

    def logs_with(self, text: str) -> list[str]:
        """Return the names of the logs that contain a text."""
        wanted = text.encode()
        return [log.stem for log in sorted(self.logs.iterdir()) if wanted in log.read_bytes()]

    def end(self) -> None:
        """End all programs, first by SIGTERM, then by SIGKILL, and wait until none is left."""
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
            for program in self._programs:
                program.send(number)  # where no mark can be seen, its group at least
            for pid in self.alive():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            deadline = time.monotonic() + patience
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.2)
        if left := self.alive():
            raise RuntimeError(f"these processes would not end: {sorted(left)}")

    def alive(self) -> set[int]:
        """Return the ids of all marked processes and of the programs started here."""
        found = {program._process.pid for program in self._programs if program.running}
        marked = f"{MARK}={self._mark}".encode()
        return found | {pid for pid, environ in _environments() if marked in environ}


def _environments() -> Iterator[tuple[int, bytes]]:
    """Yield process ids and their environments where the system shows them (Linux); no zombies."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if int(entry.name) != os.getpid():
                yield int(entry.name), (entry / "environ").read_bytes()


def free_ports(count: int) -> list[int]:
    """Find different TCP ports of the loopback interface on which nobody listens just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Check a condition twice a second until it holds.

    Raises:
        TimeoutError: it never was; names what.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.5)
