"""Records of what passes between FedML's processes, by proxies or by the processes themselves."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import start

from harness.processes.wiretap import Wiretap

__all__ = ["TransportTaps"]

Comm = Mapping[str, Any]


class TransportTaps:
    """Taps of one run.

    gRPC has a proxy before each process, MQTT_S3 one before the broker and one before the store.
    With TRPC, processes tell each other their addresses, and no proxy fits between; there each
    process records what it hands to torch's RPC, already serialised, before it is sent.

    Args:
        backend: FedML's ``backend``.
        folder: folder of the run.
        clients: client processes.
        comm: the run's ``comm_args``.
        stack: ends the proxies.
        record: whether to keep the bytes, and not only to count them.

    Attributes:
        taps: taps by the rank of their process, or 0 for the broker and 1 for the store.
    """

    def __init__(
        self,
        backend: str,
        folder: Path,
        clients: int,
        comm: Comm,
        stack: ExitStack,
        *,
        record: bool,
    ) -> None:
        self.taps: dict[int, Wiretap] = {}
        self._backend, self._folder, self._comm = backend, folder, comm
        if backend == "TRPC":
            self._handed.mkdir()
            return
        if backend == "GRPC":
            ports = [start.grpc_port(folder, rank) for rank in range(clients + 1)]
        elif backend == "MQTT_S3":
            ports = [_mqtt(comm)["BROKER_PORT"], int(_endpoint(comm)[1])]
        else:
            raise ValueError(f"no tap fits {backend}")
        for place, port in enumerate(ports):
            self.taps[place] = stack.enter_context(Wiretap(port, record=record, metered=False))
        if backend == "GRPC":
            self._write_tables(ports)

    @property
    def _handed(self) -> Path:
        return self._folder / "handed"

    @property
    def env(self) -> Mapping[str, str]:
        """Return environment variables for the processes."""
        return {"FEDPARA_RECORD": str(self._handed)} if self._backend == "TRPC" else {}

    def comm(self, rank: int) -> dict[str, Any]:
        """Return the ``comm_args`` of a process, which lead it to the proxies."""
        comm: dict[str, Any] = copy.deepcopy(dict(self._comm))
        if self._backend == "GRPC":
            comm["grpc_ipconfig_path"] = str(self._folder / f"grpc-{rank}.csv")
        if self._backend == "MQTT_S3":
            host, _ = _endpoint(comm)
            _mqtt(comm)["BROKER_PORT"] = self.taps[0].port
            comm["customized_training_s3_config"]["CN_S3_ENDPOINT"] = f"{host}:{self.taps[1].port}"
        return comm

    def recorded(self) -> bytes:
        """Return all bytes, in both directions, of all connections or processes."""
        streams = [
            one for tap in self.taps.values() for w in ("up", "down") for one in tap.streams(w)
        ]
        if self._backend == "TRPC":
            streams = [path.read_bytes() for path in sorted(self._handed.iterdir())]
        return b"\n".join(streams)

    def _write_tables(self, ports: list[int]) -> None:
        """Write a table of addresses for each process; only a process itself knows its own port."""
        for rank in range(len(ports)):
            rows = ["eid,rank,grpc_server_ip,grpc_server_port"]
            for other, port in enumerate(ports):
                seen = port if other == rank else self.taps[other].port
                rows.append(f"{other},{other},127.0.0.1,{seen}")
            (self._folder / f"grpc-{rank}.csv").write_text("\n".join([*rows, ""]), "utf-8")


def _mqtt(comm: Comm) -> Any:
    return comm["customized_training_mqtt_config"]


def _endpoint(comm: Comm) -> tuple[str, str]:
    """Return host (with scheme) and port of the store."""
    host, _, port = comm["customized_training_s3_config"]["CN_S3_ENDPOINT"].rpartition(":")
    return host, port
