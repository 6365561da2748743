"""The cells of the matrix, as data. Standard library only: the renderer reads it without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product

from harness.cells.cell import Cell
from harness.cells.pairwise import pairwise
from harness.cells.refusals import refusal
from harness.cells.strategies import OURS, STRATEGIES, StrategySpec

__all__ = [
    "CODECS",
    "ENVIRONMENTS",
    "GAMMA",
    "LATEST",
    "METHODS",
    "MODELS",
    "NOT_BY_DEFAULT",
    "OURS",
    "STRATEGIES",
    "Cell",
    "Environment",
    "StrategySpec",
    "cells",
    "drift_cells",
    "environment",
    "every_strategy",
    "installed_version",
    "part",
]

METHODS = ("none", "lowrank", "fedpara", "pfedpara")
CODECS = ("none", "lossless", "int8", "balanced")
MODELS = ("groupnorm", "batchnorm")
GAMMA = 0.3

BASIC = ("fedavg", "fedprox", "fedadam")
"""Strategies that the smoke part runs with every method and with ``none`` and ``int8``."""


@dataclass(frozen=True)
class Environment:
    """A version of a framework, as a tox environment.

    Attributes:
        name: of the tox environment that runs all its cells; with ``-smoke`` it runs a part.
        framework: as in `Cell`.
        version: of the framework, as ``tox.ini`` has it; far above all for the latest.
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
    "core-browser": "needs Chromium; where one is found, core-py311 runs these tests too",
    "fuzz": "time: a million damaged inputs",
    "core-models": "needs Hugging Face transformers",
    "flower-engines": "time: a quarter of an hour of real processes; needs Ray",
    "fedml": "time: all cells of FedML; `fedml-smoke` runs a part",
    "fedml-py310": "needs a Python 3.10 interpreter; `fedml-py310-smoke` runs a part",
    "fedml-py312": "needs Python 3.12, and 3.11 for one wheel; `fedml-py312-smoke` runs a part",
    "fedml-engines": "time, and needs Open MPI, mosquitto and moto",
    "demo": "needs Flower's simulation engine (Ray) and some minutes; `.ci/run` runs it",
}
"""Other tox environments that the default run leaves out, and why."""


def environment() -> str:
    """The tox environment that runs; ``local`` outside tox."""
    return (os.environ.get("FEDPARA_MATRIX_ENV") or "local").removesuffix("-smoke")


def part() -> str:
    """``smoke`` or ``all``: how many of an environment's cells run."""
    return "smoke" if (os.environ.get("FEDPARA_MATRIX_ENV") or "").endswith("-smoke") else "all"


def installed_version(framework: str = "flower") -> str:
    """The framework's version here; empty if it is not installed."""
    try:
        return version({"flower": "flwr"}.get(framework, framework))
    except PackageNotFoundError:
        return ""


def cells(environment_name: str, which: str = "all") -> list[Cell]:
    """What runs in an environment.

    Args:
        environment_name: one of `ENVIRONMENTS`, or ``local``, which is the latest.
        which: ``all`` or ``smoke``.
    """
    rows = _smoke() if which == "smoke" else _all(environment_name)
    found = [Cell("flower", environment_name, *row) for row in rows]
    version = next((e.version for e in ENVIRONMENTS if e.name == environment_name), "999.0")
    return list(dict.fromkeys(found + _in_place_of_refusals(found, version)))


def drift_cells(environment_name: str, which: str = "all") -> list[Cell]:
    """The cells of `OURS`, whose clients have lines of their own; as `cells`."""
    if environment_name not in (LATEST, "flower-oldest", "local") or which == "smoke":
        rows = [("scaffold", "pfedpara", "int8", "groupnorm")]
        rows += [("feddyn", "fedpara", "int8", "groupnorm")]
    else:
        rows = [
            (strategy, method, codec, "groupnorm")
            for strategy, method, codec in product(OURS, METHODS, ("none", "int8"))
        ]
        rows += [(strategy, "fedpara", "balanced", "batchnorm") for strategy in OURS]
    return [Cell("flower", environment_name, *row) for row in rows]


def every_strategy(which: str) -> tuple[str, ...]:
    """The strategies of the tests beside the cells, in a part of an environment."""
    return BASIC if which == "smoke" else tuple(STRATEGIES)


Row = tuple[str, str, str, str]


def _all(environment_name: str) -> list[Row]:
    """The full table on the latest version, every pair of values on the others."""
    factors = {
        "strategy": tuple(STRATEGIES),
        "method": METHODS,
        "codec": CODECS,
        "model": MODELS,
    }
    pairs = [(r["strategy"], r["method"], r["codec"], r["model"]) for r in pairwise(factors)]
    if environment_name not in (LATEST, "local"):
        return pairs + _batchnorm() + _upstream()
    full = [
        (strategy, method, codec, "groupnorm")
        for strategy, method in product(STRATEGIES, METHODS)
        for codec in _two_codecs(strategy)
    ]
    return full + _smoke() + pairs + _upstream()


def _upstream() -> list[Row]:
    """Where Flower itself fails on BatchNorm, in all versions or in old ones; the plugin is off."""
    names = ("qfedavg", "dpserverfixed", "dpclientfixed", "fedadam")
    return [(name, "none", "none", "batchnorm") for name in names]


def _in_place_of_refusals(found: list[Cell], version: str) -> list[Cell]:
    """For each cell that cannot train the next one that can: a pair is not met by a refusal."""
    refused = [cell for cell in found if refusal(cell, version) is not None]
    allowed = [replace(cell, model="groupnorm") for cell in refused]
    return [
        cell if refusal(cell, version) is None else replace(cell, codec="lossless")
        for cell in allowed
    ]


def _two_codecs(strategy: str) -> tuple[str, str]:
    """A lossy codec after the client's clip is refused, which the pairs show."""
    return ("none", "lossless") if STRATEGIES[strategy].client_mod else ("none", "int8")


def _smoke() -> list[Row]:
    """Every strategy once, methods in turn; the basic ones with each method; BatchNorm."""
    square = [
        (strategy, method, codec, "groupnorm")
        for strategy, method, codec in product(BASIC, METHODS, ("none", "int8"))
    ]
    rest = [name for name in STRATEGIES if name not in BASIC]
    once = [
        (strategy, METHODS[-1 - place % 3], _two_codecs(strategy)[1], "groupnorm")
        for place, strategy in enumerate(rest)
    ]
    return square + _batchnorm() + once


def _batchnorm() -> list[Row]:
    """With the strategy that takes it in every version."""
    return [
        ("fedavg", method, codec, "batchnorm")
        for method, codec in product(("none", "fedpara", "pfedpara"), ("none", "int8"))
    ]
