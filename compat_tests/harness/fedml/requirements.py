"""Programs and packages that FedML's transports need: what is missing, and how to get it."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

__all__ = ["missing_for", "skip_without"]


def skip_without(backend: str) -> None:
    """Skip the test that calls this if a backend cannot run here, with the reason and the remedy.

    Args:
        backend: FedML's name of it.
    """
    if reason := missing_for(backend):
        pytest.skip(reason)


def missing_for(backend: str) -> str:
    """Say what a backend lacks on this machine and how to get it; "" if it can run."""
    missing = [*_programs(backend), *_modules(backend)]
    return f"{backend} needs {' and '.join(missing)}" if missing else ""


def _programs(backend: str) -> list[str]:
    missing, more = [], ""
    if backend == "MPI" and shutil.which("mpirun") is None:
        missing.append("mpirun")
    if backend == "MQTT_S3":
        if shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            missing.append("mosquitto")
        # An empty MOTO_SERVER counts as unset; a wrong one is no reason to take another.
        moto = os.environ.get("MOTO_SERVER") or shutil.which("moto_server")
        if moto is None or not Path(moto).exists():
            missing.append("moto_server")
            more = "; outside of tox, set MOTO_SERVER to build/moto/bin/moto_server"
    names = ", ".join(missing)
    return [f"{names} (engine_tests/install.sh installs it{more})"] if missing else []


def _modules(backend: str) -> list[str]:
    module = {"MPI": "mpi4py", "GRPC": "grpc"}.get(backend)
    package = {"mpi4py": "mpi4py", "grpc": "grpcio"}
    if module is None or find_spec(module) is not None:
        return []
    return [f"{package[module]} (pip install {package[module]})"]
