"""Flower's engines as real processes on loopback: a deployment behind a wiretap, and simulation.

For Flower 1.40 and later, where one HTTP port of the SuperLink serves all.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.flower.certificates import Certificates, certificates, node_key
from harness.oracles import task
from harness.processes.supervisor import Processes, Program, free_ports, wait_until
from harness.processes.wiretap import Wiretap

__all__ = ["Deployment", "FinishedRun", "app_copy", "deployment", "simulated"]

CONNECTION = "engine"
START = 180.0
"""Seconds for a server or a command; long, since the machine may be busy."""
LIMIT = 900.0
"""Seconds for a run."""

RAY_TOO_LATE = "The current node timed out during startup"
"""Ray gives itself 30 s to start, too few on a busy machine, and has no option for it. Nothing
has run then, so such a run is started again."""
ATTEMPTS = 3

RunConfig = Mapping[str, bool | float | int | str]


def app_copy(source: Path, folder: Path, *more: Path) -> Path:
    """Copy an app, put further modules into its package, and return the copy.

    Args:
        source: the app's folder; its package has the folder's name.
        folder: where the copy goes.
        more: Python files; without any, the matrix's task.
    """
    app = folder / source.name
    shutil.copytree(source, app, ignore=shutil.ignore_patterns("__pycache__"))
    for module in more or (Path(task.__file__),):
        shutil.copy(module, app / source.name)
    return app


@dataclass(frozen=True)
class FinishedRun:
    """A run that is over.

    Attributes:
        log: what ``flwr run --stream`` showed: the ServerApp's log.
        status: Flower's word for how it ended.
        traffic: Flower's own count of bytes sent to and received from the SuperNodes; 0 in
            simulation.
    """

    log: str
    status: str
    traffic: int = 0

    def check(self) -> FinishedRun:
        """Return itself if the run completed.

        Raises:
            RuntimeError: it did not; holds the end of the log.
        """
        if self.status != "finished:completed":
            end = "\n".join(self.log.splitlines()[-60:])
            raise RuntimeError(f"the run ended as {self.status!r}:\n{end}")
        return self


class Deployment:
    """A SuperLink and its SuperNodes.

    Attributes:
        processes: the processes in which everything runs.
        tap: between the SuperNodes and the SuperLink.
        nodes: the SuperNodes, by partition.
    """

    def __init__(
        self,
        processes: Processes,
        tap: Wiretap,
        count: int,
        files: Certificates | None,
        node_config: Mapping[int, str],
    ) -> None:
        self.processes = processes
        self.tap = tap
        self.nodes: list[Program] = []
        self._count = count
        self._files = files
        self._node_config = node_config
        self._keys: dict[int, Path] = {}

    def register(self, partition: int) -> None:
        """Make a key pair for a SuperNode and tell the SuperLink the public one."""
        path = self.processes.home / f"node-{partition}"
        public = node_key(path)
        command = ("flwr", "supernode", "register", str(public), CONNECTION)
        self.processes.run(f"register-{partition}", *command, seconds=START)
        self._keys[partition] = path

    def start_node(self, partition: int) -> None:
        """Start a SuperNode, or start it again."""
        config = f"partition-id={partition} num-partitions={self._count}"
        config = f"{config} {self._node_config.get(partition, '')}".strip()
        options = ["--superlink", f"127.0.0.1:{self.tap.port}"]
        options += ["--port", str(free_ports(1)[0]), "--node-config", config]
        if self._files is None:
            options += ["--insecure"]
        else:
            options += ["--root-certificates", str(self._files.authority)]
        if partition in self._keys:
            options += ["--auth-supernode-private-key", str(self._keys[partition])]
        program = self.processes.start(f"supernode-{partition}", "flower-supernode", *options)
        self.nodes[partition : partition + 1] = [program]

    def submit(self, app: Path, config: RunConfig) -> Program:
        """Start ``flwr run``, which ends when the run does."""
        command = ("flwr", "run", str(app), CONNECTION, "--stream")
        return self.processes.start("run", *command, "--run-config", _overrides(config))

    def finish(self, program: Program, seconds: float = LIMIT) -> FinishedRun:
        """Wait for the end of a run, and ask Flower how it went."""
        code = program.wait(seconds)
        return _finished(self.processes, program.text, code)

    def run(self, app: Path, config: RunConfig, seconds: float = LIMIT) -> FinishedRun:
        """Run an app to its end."""
        return self.finish(self.submit(app, config), seconds)


@contextlib.contextmanager
def deployment(
    folder: Path,
    *,
    nodes: int = 2,
    tls: bool = False,
    authenticated: bool = False,
    record: bool = False,
    env: Mapping[str, str] | None = None,
    node_config: Mapping[int, str] | None = None,
) -> Iterator[Deployment]:
    """Start a SuperLink and SuperNodes, and end them.

    Args:
        folder: a fresh one for settings, logs and certificates.
        nodes: how many SuperNodes.
        tls: encrypt; authentication does so too.
        authenticated: SuperNodes prove with a registered key who they are.
        record: keep all bytes between SuperNodes and SuperLink.
        env: further environment variables.
        node_config: more of the config of some nodes, by partition.
    """
    port = free_ports(1)[0]
    files = certificates(folder / "certificates") if tls or authenticated else None
    with Processes(folder, env) as processes:
        _connect(processes.home, port, files)
        options = ["--insecure"]
        if files is not None:
            options = ["--ssl-ca-certfile", str(files.authority)]
            options += ["--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key)]
        if authenticated:
            options += ["--enable-supernode-auth"]
        _start_link(processes, port, *options)
        with Wiretap(port, record=record, metered=files is None) as tap:
            deployed = Deployment(processes, tap, nodes, files, node_config or {})
            for partition in range(nodes):
                if authenticated:
                    deployed.register(partition)
                deployed.start_node(partition)
            yield deployed
            processes.end()


def simulated(
    folder: Path, app: Path, config: RunConfig, *, nodes: int = 2, seconds: float = LIMIT
) -> FinishedRun:
    """Run an app to its end in Flower's simulation engine (Ray), through ``flwr run``.

    The SuperLink is one of our own: what ``flwr run`` starts by itself must answer within 15 s, too
    soon for a busy machine.
    """
    port = free_ports(1)[0]
    federation = f"num-supernodes={nodes} client-resources-num-cpus=1"
    options = ("--federation-config", federation, "--run-config", _overrides(config))
    with Processes(folder) as processes:
        _connect(processes.home, port, None)
        _start_link(processes, port, "--insecure", "--simulation")
        command = ("flwr", "run", str(app), CONNECTION, "--stream", *options)
        for _ in range(ATTEMPTS):
            program = processes.start("run", *command)
            code = program.wait(seconds)
            finished = _finished(processes, program.text, code)
            if RAY_TOO_LATE not in finished.log:
                break
        return finished


def _connect(home: Path, port: int, files: Certificates | None) -> None:
    """Tell ``flwr`` where the SuperLink is."""
    security = f'root-certificates = "{files.authority}"' if files else "insecure = true"
    text = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\n{security}\n'
    (home / "config.toml").write_text(text, encoding="utf-8")


def _start_link(processes: Processes, port: int, *options: str) -> None:
    command = ("flower-superlink", "--host", "127.0.0.1", "--port", str(port), *options)
    link = processes.start("superlink", *command)
    wait_until(lambda: _listens(link, port), seconds=START, what="the SuperLink listens")


def _listens(link: Program, port: int) -> bool:
    if not link.running:
        raise RuntimeError(f"flower-superlink ended:\n{link.tail()}")
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _overrides(config: RunConfig) -> str:
    """Write all options as one: of two, Flower keeps only the last one's nested values."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())


def _finished(processes: Processes, log: str, code: int) -> FinishedRun:
    """Ask Flower how a run ended; ``flwr run`` itself ends with 0 in any case."""
    found = re.search(r"run[ _-]?(?:id)?\W*(\d{6,})", log, re.IGNORECASE)
    if code or found is None:
        raise RuntimeError(f"flwr run ended with {code} and started no run:\n{log}")
    command = ("flwr", "list", CONNECTION, "--run-id", found[1], "--format", "json")
    answer: dict[str, Any] = json.loads(processes.run("list", *command, seconds=START))
    run = answer["runs"][0]
    return FinishedRun(log, run["status"], run["network-traffic"]["total-bytes"])
