"""The modes and optimizers that a project asks for, and whether the plugin runs them."""

from __future__ import annotations

from typing import Any

from fedpara_plugins import ConfigError
from fedpara_plugins_fedml.environment import missing_for

__all__ = ["BACKENDS", "is_distributed", "lacks_optimizer", "looks_distributed"]

BACKENDS = {"simulation": ("MPI",), "cross_silo": ("TRPC", "MPI", "GRPC", "MQTT_S3")}
"""Transports that the plugin runs, by ``training_type``; the single process is not among them."""

MISSING_OPTIMIZERS = {
    ("cross_silo", None): ("FedProx", "FedOpt", "SCAFFOLD", "FedDyn", "FedNova", "Mime"),
    ("simulation", "MPI"): ("FedProx", "FedOpt", "SCAFFOLD", "FedDyn", "Mime"),
}
"""Optimizers that FedML 0.9.6 does not have, or that raise an error for any model, by training type
and backend (docs/fedml-faults.md)."""


def looks_distributed(args: Any) -> bool:
    """Return whether there are other processes that would wait for this one."""
    kind, backend = str(getattr(args, "training_type", "")), str(getattr(args, "backend", ""))
    return backend in BACKENDS.get(kind, ())


def lacks_optimizer(args: Any) -> bool:
    """Return whether the project names an optimizer that only the plugin's engine runs."""
    kind, backend = str(getattr(args, "training_type", "")), str(getattr(args, "backend", ""))
    names = MISSING_OPTIMIZERS.get((kind, backend)) or MISSING_OPTIMIZERS.get((kind, None), ())
    return getattr(args, "federated_optimizer", None) in names


def is_distributed(args: Any) -> bool:
    """Return whether a project's keys ask for several processes.

    Raises:
        ConfigError: if they ask for something that the plugin's engine does not run.
    """
    kind, backend = str(args.training_type), str(getattr(args, "backend", ""))
    if kind == "simulation" and backend == "sp":
        return False
    if kind not in BACKENDS:
        raise ConfigError(
            f"training_type {kind!r}: the plugin runs simulation and cross_silo. Remove the "
            f"fedpara_* keys to run it as FedML does"
        )
    if backend not in BACKENDS[kind]:
        known = ", ".join(["sp"] * (kind == "simulation") + list(BACKENDS[kind]))
        raise ConfigError(
            f"backend {backend!r} with training_type {kind!r}: the plugin runs {known}"
        )
    scenario = str(getattr(args, "scenario", "horizontal"))
    if kind == "cross_silo" and scenario != "horizontal":
        raise ConfigError(
            f"scenario {scenario!r}: the plugin runs cross_silo with scenario horizontal (in FedML "
            f"0.9.6 the hierarchical one fails in its own initialisation)"
        )
    if lack := missing_for(backend):
        raise ConfigError(f"backend {backend} {lack}")
    return True
