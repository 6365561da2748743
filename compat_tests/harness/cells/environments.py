"""The tox environments of the matrix: which version each has, and which part of it runs.

Standard library only: the renderer reads it without torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

__all__ = [
    "ENVIRONMENTS",
    "LATEST",
    "NOT_BY_DEFAULT",
    "Environment",
    "environment",
    "installed_version",
    "selection",
]


@dataclass(frozen=True)
class Environment:
    """A version of a framework, as a tox environment.

    Attributes:
        name: name of the tox environment that runs all its cells; with ``-smoke`` it runs a part.
        framework: see `Cell`.
        version: version of the framework, as in ``tox.ini``; 999.0 for the latest.
    """

    name: str
    framework: str
    version: str = "999.0"


LATEST = "flower-latest"
ENVIRONMENTS = (
    Environment(LATEST, "flower"),
    Environment("flower-138", "flower", "1.38.0"),
    Environment("flower-132", "flower", "1.32.1"),
    Environment("flower-128", "flower", "1.28.0"),
    Environment("flower-oldest", "flower", "1.22.0"),
)

NOT_BY_DEFAULT: Mapping[str, str] = {
    "core-py310": "needs a Python 3.10 interpreter",
    "core-py312": "needs a Python 3.12 interpreter",
    "core-py313": "needs a Python 3.13 interpreter",
    "core-torch24": "torch 2.4 comes with several GB of CUDA",
    "core-compiler": "needs a C++ compiler: torch.compile generates code",
    "core-long": "time: bounds on memory that take long to reach",
    "core-browser": "needs Chromium; where one is found, core-py311 runs these tests too",
    "kernels": "all models too; `distributions` runs the layers with the kernels",
    "fuzz": "time: a million damaged inputs",
    "core-models": "needs Hugging Face transformers",
    "core-loops": "needs Lightning, transformers, accelerate and schedulefree",
    "flower-engines": "time: a quarter of an hour of real processes; needs Ray",
    "fedml": "time: all cells of FedML; `fedml-smoke` runs a part",
    "fedml-py310": "needs a Python 3.10 interpreter; `fedml-py310-smoke` runs a part",
    "fedml-py312": "needs Python 3.12, and 3.11 for one wheel; `fedml-py312-smoke` runs a part",
    "fedml-engines": "time, and needs Open MPI, mosquitto and moto",
    "demo": "needs Flower's simulation engine (Ray) and some minutes; `.ci/run` runs it",
}
"""Other tox environments that the default run leaves out, and why."""


def environment() -> str:
    """Return the name of the tox environment that runs; ``local`` outside tox."""
    return (os.environ.get("FEDPARA_MATRIX_ENV") or "local").removesuffix("-smoke")


def selection() -> str:
    """Return which of an environment's cells run: ``smoke`` or ``all``."""
    return "smoke" if (os.environ.get("FEDPARA_MATRIX_ENV") or "").endswith("-smoke") else "all"


def installed_version(framework: str = "flower") -> str:
    """Return the version of the framework installed here; empty if it is not installed.

    Of training loops it names the version of each tool.
    """
    if framework == "loop":
        parts = ("lightning", "transformers", "accelerate", "schedulefree")
        return ", ".join(f"{part} {installed_version(part)}" for part in parts)
    try:
        return version({"flower": "flwr"}.get(framework, framework))
    except PackageNotFoundError:
        return ""
