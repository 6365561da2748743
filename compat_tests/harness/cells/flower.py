"""The cells of Flower, as data. Standard library only: the renderer reads it without torch."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from harness.cells.base import Cell
from harness.cells.environments import ENVIRONMENTS, LATEST
from harness.cells.pairwise import pairwise
from harness.cells.refusals import refusal
from harness.cells.strategies import PLUGIN_STRATEGIES, STRATEGIES

__all__ = [
    "CODECS",
    "GAMMA",
    "METHODS",
    "MODELS",
    "cells",
    "drift_cells",
    "every_strategy",
]

METHODS = ("none", "lowrank", "fedpara", "pfedpara")
CODECS = ("none", "lossless", "int8", "balanced")
MODELS = ("groupnorm", "batchnorm")
GAMMA = 0.3

BASIC = ("fedavg", "fedprox", "fedadam")
"""Strategies of the tests beside the cells in the smoke part."""


def cells(environment_name: str, which: str = "all") -> list[Cell]:
    """List the cells of an environment.

    Args:
        environment_name: one of `ENVIRONMENTS`, or ``local``, which is the latest.
        which: ``all`` or ``smoke``.
    """
    rows = _smoke() if which == "smoke" else _all(environment_name)
    found = [Cell("flower", environment_name, *row) for row in rows]
    version = next((e.version for e in ENVIRONMENTS if e.name == environment_name), "999.0")
    return list(dict.fromkeys(found + _in_place_of_refusals(found, version)))


def drift_cells(environment_name: str, which: str = "all") -> list[Cell]:
    """List the cells of `PLUGIN_STRATEGIES`, whose client code differs; see `cells`."""
    if environment_name not in (LATEST, "flower-oldest", "local") or which == "smoke":
        rows = [("scaffold", "pfedpara", "int8", "groupnorm")]
        rows += [("feddyn", "fedpara", "int8", "groupnorm")]
    else:
        rows = [
            (strategy, method, codec, "groupnorm")
            for strategy, method, codec in product(PLUGIN_STRATEGIES, METHODS, ("none", "int8"))
        ]
        rows += [(strategy, "fedpara", "balanced", "batchnorm") for strategy in PLUGIN_STRATEGIES]
    return [Cell("flower", environment_name, *row) for row in rows]


def every_strategy(which: str) -> tuple[str, ...]:
    """List the strategies that the tests beside the cells use."""
    return BASIC if which == "smoke" else tuple(STRATEGIES)


Row = tuple[str, str, str, str]


def _all(environment_name: str) -> list[Row]:
    """List the full table for the latest version, and every pair of values for the others."""
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
    return full + _smoke() + _batchnorm() + pairs + _upstream()


def _upstream() -> list[Row]:
    """List the cells where Flower itself fails on BatchNorm; the plugin is off."""
    names = ("qfedavg", "dpserverfixed", "dpclientfixed", "fedadam")
    return [(name, "none", "none", "batchnorm") for name in names]


def _in_place_of_refusals(found: list[Cell], version: str) -> list[Cell]:
    """Return a trainable cell for each refused one: a refusal alone covers no pair."""
    refused = [cell for cell in found if refusal(cell, version) is not None]
    allowed = [replace(cell, model="groupnorm") for cell in refused]
    return [
        cell if refusal(cell, version) is None else replace(cell, codec="lossless")
        for cell in allowed
    ]


def _two_codecs(strategy: str) -> tuple[str, str]:
    """Return two codecs, one of them lossy unless the client clips: that is refused."""
    return ("none", "lossless") if STRATEGIES[strategy].client_mod else ("none", "int8")


def _smoke() -> list[Row]:
    """List FedAvg with each method, every other strategy once, methods in turn, and BatchNorm."""
    fedavg = [("fedavg", *row, "groupnorm") for row in product(METHODS, ("none", "int8"))]
    rest = [name for name in STRATEGIES if name != "fedavg"]
    once = [
        (strategy, METHODS[-1 - place % 3], _two_codecs(strategy)[1], "groupnorm")
        for place, strategy in enumerate(rest)
    ]
    return fedavg + once + [_batchnorm()[-1]]


def _batchnorm() -> list[Row]:
    """List the BatchNorm cells, with the strategy that takes BatchNorm in every version."""
    return [
        ("fedavg", method, codec, "batchnorm")
        for method, codec in product(("none", "fedpara", "pfedpara"), ("none", "int8"))
    ]
