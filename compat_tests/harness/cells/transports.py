"""The cells that run over FedML's transports, as data. Standard library only, for the renderer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

__all__ = ["BACKENDS", "TRANSPORT_CELLS", "TransportCell"]

BACKENDS = ("TRPC", "MPI", "GRPC", "MQTT_S3")
"""FedML's transports between processes, by their ``backend``."""

METHODS = (("none", "none"), ("fedpara", "balanced"), ("pfedpara", "none"))


@dataclass(frozen=True)
class TransportCell:
    """One federated run of FedML in several processes: FedAvg, two client processes.

    Attributes:
        transport: FedML's ``backend``.
        mode: FedML's ``training_type``: ``cross_silo``, or ``simulation`` under ``mpirun``.
        method: the plugin's method.
        codec: the plugin's codec.
        silos: how many data sets there are; two of them take part in a round.
    """

    transport: str
    mode: Literal["cross_silo", "simulation"]
    method: str
    codec: str
    silos: int = 2
    framework: str = "fedml"
    environment: str = "fedml-engines"

    @property
    def id(self) -> str:
        """Return the cell's name in test ids and file names."""
        return "-".join((self.mode, self.transport, self.method, self.codec))

    @property
    def plugin(self) -> Mapping[str, Any]:
        """Return keys of ``fedpara_args`` without prefix; dense runs use the plugin's engine."""
        if self.method == "none":
            return {"mend": True, "codec": self.codec}
        return {"method": self.method, "gamma": 0.3, "codec": self.codec}


TRANSPORT_CELLS = (
    *(
        TransportCell(transport, "cross_silo", *coded)
        for transport, coded in product(BACKENDS, METHODS)
    ),
    TransportCell("MPI", "simulation", "none", "none", silos=5),
    TransportCell("MPI", "simulation", "pfedpara", "balanced", silos=5),
)
