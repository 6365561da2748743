"""The cells of the matrix, as data. Standard library only: the renderer reads it without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product

__all__ = [
    "CODECS",
    "ENVIRONMENTS",
    "GAMMA",
    "METHODS",
    "NOT_BY_DEFAULT",
    "STRATEGIES",
    "Cell",
    "Environment",
    "StrategySpec",
    "cells",
    "environment",
    "installed_version",
]


@dataclass(frozen=True)
class StrategySpec:
    """One optimizer.

    Attributes:
        class_name: in ``flwr.serverapp.strategy``.
        options: of its constructor.
        rule: of `harness.reference.RULES`: the plain computation it is checked against.
        proximal_mu: of the clients' loss in that computation; None for no such term.
    """

    class_name: str
    rule: str
    options: Mapping[str, float] = field(default_factory=dict)
    proximal_mu: float | None = None


STRATEGIES: Mapping[str, StrategySpec] = {
    "fedavg": StrategySpec("FedAvg", "fedavg"),
    "fedprox": StrategySpec("FedProx", "fedavg", {"proximal_mu": 0.1}, proximal_mu=0.1),
    "fedadam": StrategySpec("FedAdam", "fedadam", {"eta": 0.05, "tau": 0.01}),
}
METHODS = ("none", "lowrank", "fedpara", "pfedpara")
CODECS = ("none", "int8")
GAMMA = 0.3


@dataclass(frozen=True)
class Environment:
    """A version of a framework, as a tox environment.

    Attributes:
        name: of the tox environment.
        framework: as in `Cell`.
        why_not: why the default ``tox run`` leaves it out; empty if it does not.
    """

    name: str
    framework: str
    why_not: str = ""


ENVIRONMENTS = (
    Environment("flower-latest", "flower"),
    Environment("flower-oldest", "flower"),
    Environment("flower-138", "flower", "time: the oldest and the latest version bracket it"),
    Environment("flower-132", "flower", "time: the oldest and the latest version bracket it"),
    Environment("flower-128", "flower", "time: the oldest and the latest version bracket it"),
)

NOT_BY_DEFAULT: Mapping[str, str] = {
    "core-py310": "needs a Python 3.10 interpreter",
    "core-py312": "needs a Python 3.12 interpreter",
    "core-py313": "needs a Python 3.13 interpreter",
    "core-torch24": "torch 2.4 comes with several GB of CUDA",
    "core-compiler": "needs a C++ compiler: torch.compile generates code",
    "core-models": "needs Hugging Face transformers",
    "flower-engines": "time: a quarter of an hour of real processes; needs Ray",
    "demo": "needs Flower's simulation engine (Ray) and some minutes; `.ci/run` runs it",
}
"""Other tox environments that the default run leaves out, and why."""


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix: a real federated run.

    Attributes:
        framework: ``flower``.
        environment: name of the tox environment, or ``local``.
        strategy: a name in `STRATEGIES`.
        method: of the plugin.
        codec: of the plugin.
        model: a name in `harness.task.MODELS`.
    """

    framework: str
    environment: str
    strategy: str
    method: str
    codec: str
    model: str = "groupnorm"

    @property
    def id(self) -> str:
        """As in test ids and file names; the environment is left out."""
        return "-".join((self.strategy, self.method, self.codec, self.model))


def environment() -> str:
    """The tox environment that runs; ``local`` outside tox."""
    return os.environ.get("FEDPARA_MATRIX_ENV") or "local"


def installed_version(framework: str = "flower") -> str:
    """The framework's version here; empty if it is not installed."""
    try:
        return version({"flower": "flwr"}[framework])
    except PackageNotFoundError:
        return ""


def cells(environment_name: str) -> list[Cell]:
    """What runs in an environment; on every one the full square, and BatchNorm with FedAvg."""
    square = [
        Cell("flower", environment_name, *combination)
        for combination in product(STRATEGIES, METHODS, CODECS)
    ]
    # FedAdam of Flower before 1.28 refuses arrays without dimensions, which BatchNorm has.
    batchnorm = [
        Cell("flower", environment_name, "fedavg", method, codec, "batchnorm")
        for method, codec in product(("none", "fedpara", "pfedpara"), CODECS)
    ]
    return square + batchnorm
