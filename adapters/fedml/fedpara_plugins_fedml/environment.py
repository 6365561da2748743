"""Checks of the environment: what keeps FedML 0.9.6 from importing or training, and the remedies.

Nothing here imports FedML. Whether torchvision loads depends on how torch was built; where its
version leaves that open, it is imported in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedpara_plugins.support import Finding, satisfies

__all__ = ["BACKEND_PACKAGES", "PINS", "Pin", "findings", "missing_for"]


@dataclass(frozen=True)
class Pin:
    """A package that FedML needs in a certain range.

    Attributes:
        name: of the distribution.
        wanted: version range.
        reason: what happens with other versions.
    """

    name: str
    wanted: str
    reason: str


PINS = (
    Pin("setuptools", "<82", "FedML imports pkg_resources, which later ones lack"),
    Pin("numpy", "<2", "`import fedml` fails with AttributeError: np.float_ (from wandb)"),
    Pin("pandas", "<3.1", 'later ones refuse numpy 1 with "C extension: None not built"'),
    Pin("wandb", "==0.13.2", "FedML imports modules of it that other versions do not have"),
    Pin("protobuf", ">=3.20.2,<4", "wandb 0.13.2 and FedML's gRPC code were generated for it"),
    Pin("paho-mqtt", "<2", "version 2 wants an argument that FedML does not pass"),
    Pin("requests", "<2.32", "docker 6.1.3, which FedML imports, fails on later ones"),
    Pin("torchvision", "", "FedML imports it, and calls none of its compiled operators"),
)
"""Versions with their reasons, as in ``requirements-light.txt``."""

IMPORTED = (
    "GPUtil", "PyYAML", "SQLAlchemy", "boto3", "cachetools", "chardet", "click", "dill", "docker",
    "fastapi", "h5py", "httpx", "multiprocess", "networkx", "ntplib", "pillow", "prettytable",
    "psutil", "py-machineid", "pydantic", "python-dotenv", "redis", "scikit-learn", "scipy", "tqdm",
    "typing_extensions", "tzlocal", "wget",
)  # fmt: skip
"""The other packages that FedML imports before its trainers, of any version."""

BACKEND_PACKAGES: Mapping[str, str] = {"MPI": "mpi4py", "GRPC": "grpcio"}
"""The package that a transport needs besides FedML, by the value of ``backend``."""

LOADS_ANYWHERE = "<=0.16.2"
"""Releases of torchvision that import beside a torch of any build."""

REMEDY = (
    "pip install --no-deps torchvision==0.16.2"
    if sys.version_info < (3, 12)
    else "install the torchvision that belongs to your torch, from where your torch comes"
)
"""The remedy for torchvision; 0.16.2 was built for Python up to 3.11."""


def findings() -> Iterator[Finding]:
    """Yield findings on pinned versions, the other packages, the transports, and the network."""
    yield _python()
    for pin in PINS:
        yield _pinned(pin)
    yield _imported()
    found = _version("torchvision")
    if found is not None and not satisfies(found, LOADS_ANYWHERE):
        yield _torchvision(found)
    for backend, name in BACKEND_PACKAGES.items():
        text = missing_for(backend)
        if text:
            yield Finding("note", f"FedML backend {backend}", text)
        else:
            yield Finding("ok", f"FedML backend {backend}", f"{name} {_version(name)}")
    yield _network()


def missing_for(backend: str) -> str:
    """Return what a transport lacks, with the remedy; "" if it lacks nothing or is not known."""
    name = BACKEND_PACKAGES.get(backend)
    if name is None or _version(name) is not None:
        return ""
    more = ", and an MPI such as Debian's openmpi-bin for mpirun" if backend == "MPI" else ""
    return f"needs {name}, which is not installed: pip install {name}{more}"


def _python() -> Finding:
    numbers = sys.version_info[:2]
    text = ".".join(map(str, numbers))
    if numbers < (3, 10):
        return Finding("attention", "FedML and python", f"{text}: FedML 0.9.6 imports from 3.10 on")
    if numbers > (3, 12):
        return Finding(
            "attention", "FedML and python", f"{text}: FedML 0.9.6 is known to work up to 3.12"
        )
    return Finding("ok", "FedML and python", text)


def _pinned(pin: Pin) -> Finding:
    subject, found = f"FedML needs {pin.name}", _version(pin.name)
    line = REMEDY if pin.name == "torchvision" else f"pip install '{pin.name}{pin.wanted}'"
    if found is None:
        return Finding("attention", subject, f"not installed; {pin.reason}: {line}")
    if not satisfies(found, pin.wanted):
        text = f"{found} does not fit {pin.wanted}; {pin.reason}: {line}"
        return Finding("attention", subject, text)
    return Finding("ok", subject, f"{found} (needs {pin.wanted})" if pin.wanted else found)


def _imported() -> Finding:
    subject = "FedML imports"
    missing = [name for name in IMPORTED if _version(name) is None]
    if not missing:
        return Finding("ok", subject, f"{len(IMPORTED)} other packages, which are installed")
    text = f"{', '.join(missing)}: not installed; `import fedml` fails: pip install"
    return Finding("attention", subject, f"{text} {' '.join(missing)}")


def _torchvision(found: str) -> Finding:
    """Return whether torchvision loads with this torch, after trying it in another process."""
    error = _import_error("torchvision")
    subject = "torchvision beside torch"
    if error:
        text = f"{found} does not import ({error}); `import fedml` fails with it: {REMEDY}"
        return Finding("attention", subject, text)
    return Finding("ok", subject, f"{found} imports beside torch {_version('torch')}")


def _import_error(module: str) -> str:
    """Return the last line of an import's error in a new interpreter; "" if it succeeds."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return type(error).__name__
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason"])[-1]


def _network() -> Finding:
    """Return whether `fedml.init` waits for one of FedML's servers; see docs/fedml.md."""
    kept = Path.home() / ".fedml" / "global_services" / ".env"
    subject = "FedML and the network"
    try:
        lines = kept.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    values = [line.partition("=")[2].strip(" '\"") for line in lines if "ENV_VERSION" in line]
    if values and values[-1] != "local":
        return Finding(
            "note",
            subject,
            f"{kept} says {values[-1]!r} and overrides FEDML_ENV_VERSION: fedml.init() asks "
            f"open.fedml.ai for its configuration and has no time limit. Delete the file and set "
            f"FEDML_ENV_VERSION=local for a run without it",
        )
    if not values and os.environ.get("FEDML_ENV_VERSION") != "local":
        return Finding(
            "note",
            subject,
            "fedml.init() asks open.fedml.ai for its configuration and has no time limit: set "
            "FEDML_ENV_VERSION=local in the environment for a run without it",
        )
    return Finding("ok", subject, "local: fedml.init() contacts no server on the internet")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
