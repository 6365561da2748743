"""Runs of the FedML project in `engine_tests/fedml_app`: real processes on a real transport."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from fedpara_plugins import FedParaConfig, ModelSpec, convert, split
from harness.cells.transports import BACKENDS
from harness.processes.kept_private import KeptPrivate, Traffic
from harness.processes.supervisor import Processes, Program, wait_until

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "examples" / "fedml_cross_silo"))

import digits  # noqa: E402
import start  # noqa: E402
from net import Net  # noqa: E402

from harness.fedml.taps import TransportTaps  # noqa: E402

__all__ = ["BACKENDS", "FedMLDeployment", "Net", "accuracy"]

APP = ROOT / "engine_tests" / "fedml_app" / "main.py"

PATIENCE = 900.0
"""Seconds for a run: importing FedML alone takes 6 to 40, and minutes on a busy machine."""


class FedMLDeployment:
    """One run, a context: at its end no process of it is left.

    Args:
        folder: a fresh one.
        backend: FedML's ``backend``.
        clients: client processes.
        plugin: keys of ``fedpara_args``; None for FedML's own runner.
        of_rank: other keys for some of the processes, None for FedML's own runner there.
        train: keys of ``train_args``.
        common: keys of ``common_args``.
        trouble: what goes wrong; see the project.
        tap: whether a `TransportTaps` counts the bytes between processes (not with MPI).
        record: whether it keeps them.
        app: the project's script.
    """

    def __init__(
        self,
        folder: Path,
        backend: str,
        *,
        clients: int = 2,
        plugin: Mapping[str, Any] | None = None,
        of_rank: Mapping[int, Mapping[str, Any] | None] | None = None,
        train: Mapping[str, Any] | None = None,
        common: Mapping[str, Any] | None = None,
        trouble: str = "",
        tap: bool = False,
        record: bool = False,
        app: Path = APP,
    ) -> None:
        self.backend = backend
        self.clients = clients
        self.folder = folder
        self.notes = folder / "notes"
        self._messages = folder / "messages"
        self.checkpoint = folder / "final.safetensors"
        self.ledger = folder / "ledger.jsonl"
        self.wire: TransportTaps | None = None
        self.programs: dict[str, Program] = {}
        self._of_rank = dict(of_rank or {})
        self._plugin = plugin
        self._train = dict(train or {})
        self._common = dict(common or {})
        self._trouble = trouble
        self._tapped = tap or record
        self._record = record
        self._app = app
        self._stack = ExitStack()

    def __enter__(self) -> FedMLDeployment:
        self.notes.mkdir(parents=True)
        self._messages.mkdir()
        home = self.folder / "home"
        home.mkdir()
        env = {
            "HOME": str(home),
            "FEDML_ENV_VERSION": "local",
            "FEDPARA_NOTES": str(self.notes),
            "FEDPARA_TROUBLE": self._trouble,
        }
        self.processes = self._stack.enter_context(Processes(self.folder / "run", env))
        self._sections = start.comm_sections(self.backend, self.folder, self.clients)
        if self.backend == "MQTT_S3":
            comm = self._sections["comm_args"]
            self._stack.enter_context(start.broker_and_store(comm, self.folder))
        if self._tapped:
            self.wire = TransportTaps(
                self.backend,
                self.folder,
                self.clients,
                self._sections["comm_args"],
                self._stack,
                record=self._record,
            )
            self.processes.env |= self.wire.env
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    # Running

    def config(self, rank: int) -> Path:
        """Write the configuration of one process and return its path."""
        plugin = self._of_rank.get(rank, self._plugin)
        keys = None
        if plugin is not None:
            common = {"clip": "none"} if "method" in plugin else {}  # as the plain loops
            keys = {f"fedpara_{key}": value for key, value in {**common, **plugin}.items()}
            if rank == 0:
                keys |= {"fedpara_checkpoint": str(self.checkpoint)}
                keys |= {"fedpara_ledger": str(self.ledger)}
        path = start.write_config(
            self.folder / f"config-{rank}.yaml",
            clients=self.clients,
            sections=self._sections,
            train=self._train,
            plugin=keys,
        )
        content = yaml.safe_load(path.read_text("utf-8"))
        content["common_args"] |= self._common
        if self.wire is not None:
            content["comm_args"] |= self.wire.comm(rank)
        path.write_text(yaml.safe_dump(content), "utf-8")
        return path

    def start(self, rank: int, **env: str) -> Program:
        """Start one process."""
        name = "server" if rank == 0 else f"client-{rank}"
        switch = "off" if self._of_rank.get(rank, self._plugin) is None else "on"
        self.processes.env |= {"FEDPARA_PLUGIN": switch, **env}
        words = [sys.executable, str(self._app), "--cf", str(self.config(rank))]
        words += ["--rank", str(rank), "--role", "client" if rank else "server"]
        program = self.programs[name] = self.processes.start(name, *words)
        # A gRPC client of FedML's own ends at once where nobody listens yet.
        alone = self._plugin is None or None in self._of_rank.values()
        if rank == 0 and self.backend == "GRPC" and alone:
            port = start.grpc_port(self.folder, 0)
            wait_until(lambda: _listens(port), seconds=PATIENCE, what="the server listens")
        return program

    def start_all(self) -> None:
        """Start all processes; FedML's single process counts as one."""
        if self.backend == "sp":
            self.start(0)
            return
        if self.backend != "MPI":
            for rank in range(self.clients + 1):
                self.start(rank)
            return
        words = start.mpirun(1)
        place = words.index("-np")
        del words[place : place + 2]
        for rank in range(self.clients + 1):
            switch = "off" if self._of_rank.get(rank, self._plugin) is None else "on"
            program = [sys.executable, str(self._app), "--cf", str(self.config(rank))]
            words += [":"] if rank else []
            words += ["-np", "1", "env", f"FEDPARA_PLUGIN={switch}", *program]
        self.programs["mpirun"] = self.processes.start("mpirun", *words)

    def wait(self, seconds: float = PATIENCE) -> dict[str, int]:
        """Wait until all processes have ended, and return their exit codes."""
        return {name: program.wait(seconds) for name, program in self.programs.items()}

    def run(self) -> dict[str, int]:
        """Start all processes, wait for them, and return their exit codes."""
        self.start_all()
        return self.wait()

    def run_to_the_end(self) -> None:
        """Run all processes to a good end.

        Raises:
            RuntimeError: a process ended with another code than 0.
        """
        for name, code in self.run().items():
            if code:
                raise RuntimeError(f"{name} ended with {code}:\n{self.programs[name].tail()}")

    def finished(self) -> FedMLDeployment:
        """Run all processes to a good end, and assert that nothing private left a client.

        Raises:
            RuntimeError: a process ended with another code than 0.
        """
        self.run_to_the_end()
        if not self.processes.env.get("FEDPARA_LEAK"):
            self.check_nothing_private_left()
        return self

    def check_nothing_private_left(self) -> None:
        """Assert that no message of a client holds what it keeps; with a control."""
        plugin = dict(self._plugin or {})
        if plugin.get("method", "none") == "none" and not plugin.get("private"):
            return
        known = {field.name for field in fields(FedParaConfig)}
        options = {key: value for key, value in plugin.items() if key in known}
        model = convert(Net(), FedParaConfig.from_mapping(options))
        names = set(split(model).private)
        if not names:
            return
        states = [torch.load(path, weights_only=True) for path in self.notes.glob("*-after.pt")]
        seeded = ModelSpec.of(model).initial_private()
        found = KeptPrivate.of(states, names, seeded=seeded)
        traffic = self.traffic
        found.check(traffic)
        found.check_control(traffic, raw=str(plugin.get("codec", "none")) == "none")

    @property
    def traffic(self) -> list[Traffic]:
        """What came to clients' engines, and what left them and their processes."""
        from fedpara_plugins_fedml.messages.envelope import unpack

        found = []
        for path in sorted(self._messages.iterdir()):
            data = path.read_bytes()
            payloads = unpack(data).payloads if path.suffix == ".message" else {}
            found.append(Traffic(path.name.split(".")[1], data, payloads))
        return found

    # What came of it

    @property
    def final(self) -> dict[str, Tensor]:
        """Load the server's dense model."""
        return load_file(self.checkpoint)

    def noted(self, client: int, number: int, when: str) -> dict[str, Tensor]:
        """Load a client's state of a round (from 1 on), ``before`` or ``after`` training."""
        path = self.notes / f"{client}-{number}-{when}.pt"
        state: dict[str, Tensor] = torch.load(path, weights_only=True)
        return state

    def text(self, name: str) -> str:
        """Return what a process printed; under ``mpirun``, the output of all."""
        return self._program(name).text

    def tail(self, name: str) -> str:
        """Return the last lines of `text`."""
        return self._program(name).tail()

    def _program(self, name: str) -> Program:
        return self.programs["mpirun" if self.backend == "MPI" else name]


def accuracy(state: Mapping[str, Tensor]) -> float:
    """Return the accuracy of the project's model with these dense weights on unseen images.

    However many clients there are, they hold out the first fifth between them.
    """
    model = Net()
    model.load_state_dict(state)
    model.eval()
    right = total = 0
    with torch.no_grad():
        for images, labels in digits.load(1, 100)[3]:
            right += int((model(images).argmax(-1) == labels).sum())
            total += len(labels)
    return right / total


def _listens(port: int) -> bool:
    with socket.socket() as each:
        return each.connect_ex(("127.0.0.1", port)) == 0
