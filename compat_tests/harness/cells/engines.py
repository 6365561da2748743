"""The cells that run on Flower's engines, as data. Standard library only, for the renderer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ENGINE_CELLS", "EngineCell"]

Engine = Literal["deployment", "simulation"]


@dataclass(frozen=True)
class EngineCell:
    """One federated run on an engine, through ``flwr run``: FedAvg, two rounds.

    Attributes:
        engine: ``deployment`` (real processes) or ``simulation`` (Ray).
        variant: ``insecure``, ``tls`` or ``authenticated`` (with TLS) in deployment; else ``ray``.
        method: the plugin's method.
        codec: the plugin's codec.
        clients: number of clients.
    """

    engine: Engine
    variant: str
    method: str
    codec: str
    clients: int = 2
    framework: str = "flower"
    environment: str = "flower-engines"

    @property
    def id(self) -> str:
        """Return the cell's name in test ids and file names."""
        return "-".join((self.engine, self.variant, self.method, self.codec))


ENGINE_CELLS = (
    EngineCell("deployment", "insecure", "fedpara", "none", clients=3),
    EngineCell("deployment", "insecure", "fedpara", "balanced"),
    EngineCell("deployment", "tls", "fedpara", "none"),
    EngineCell("deployment", "authenticated", "pfedpara", "none"),
    EngineCell("simulation", "ray", "fedpara", "none", clients=3),
    EngineCell("simulation", "ray", "pfedpara", "balanced", clients=3),
)
