"""The cells of FedML, as data. Standard library only: the renderer reads it without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from harness.cells.base import Cell

__all__ = ["FEDML", "FEDML_ENVIRONMENT", "HIERARCHICAL", "FedMLSpec", "fedml_cells"]

FEDML_ENVIRONMENT = "fedml"
METHODS = ("none", "lowrank", "fedpara", "pfedpara")
CODECS = ("none", "lossless", "int8", "balanced")
HIERARCHICAL = "hierarchicalfl"


@dataclass(frozen=True)
class FedMLSpec:
    """One optimizer, and the plain computation that it is checked against.

    Attributes:
        label: name in the table.
        optimizer: FedML's ``federated_optimizer``.
        keys: keys of the YAML.
        algorithm: a name in `harness.oracles.fedml_rules.ALGORITHMS`; the optimizer's if empty.
        more: keys of the plain computation that differ from the YAML's.
        lost: largest distance of a run with a lossy codec from the plain loop, relative to the
            loop's way. It is larger where more than the model is coded.
    """

    label: str
    optimizer: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    algorithm: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    lost: float = 0.05


def _opt(label: str, name: str, rate: float, **more: Any) -> FedMLSpec:
    """Describe FedOpt under FedML's own rule, except for the constant in the root."""
    keys = {"server_optimizer": name, "server_lr": rate, "fedpara_server_tau": 0.01}
    return FedMLSpec(label, "FedOpt", keys, **more)


FEDML: Mapping[str, FedMLSpec] = {
    "fedavg": FedMLSpec("FedAvg", "FedAvg"),
    "fedprox": FedMLSpec("FedProx", "FedProx", {"fedprox_mu": 0.1}),
    "fedavgm": FedMLSpec(
        "FedOpt, sgd",
        "FedOpt",
        {"server_optimizer": "sgd", "server_lr": 0.9, "server_momentum": 0.5},
    ),
    "fedadagrad": _opt("FedOpt, adagrad", "adagrad", 0.05, more={"eps": 0.01}),
    "fedadam": _opt("FedOpt, adam", "adam", 0.05, more={"eps": 0.01}),
    "fedyogi": _opt("FedOpt, yogi", "yogi", 0.05, algorithm="published yogi", more={"tau": 0.01}),
    "scaffold": FedMLSpec("SCAFFOLD", "SCAFFOLD", {"fedpara_guard": False}, lost=0.1),
    # At the others' rate two rounds, with its longer step, are too few to learn.
    "feddyn": FedMLSpec("FedDyn", "FedDyn", {"feddyn_alpha": 0.3, "learning_rate": 0.03}, lost=0.1),
    "fednova": FedMLSpec("FedNova", "FedNova", {"momentum": 0.5, "mu": 0.1, "gmf": 0.3}),
    "mime": FedMLSpec(
        "Mime", "Mime", {"server_optimizer": "sgd", "server_momentum": 0.5}, lost=0.1
    ),
    "mimelite": FedMLSpec(
        "MimeLite",
        "Mime",
        {"server_optimizer": "sgd", "server_momentum": 0.5, "mimelite": True},
        lost=0.1,
    ),
    HIERARCHICAL: FedMLSpec("HierarchicalFL", "HierarchicalFL"),
}
"""By marker. HierarchicalFL is FedML's alone: its cells are its error and the plugin's refusal."""


def fedml_cells(environment_name: str, which: str = "all") -> list[Cell]:
    """List the cells of an environment of FedML; see `harness.cells.flower.cells`."""
    ours = [name for name in FEDML if name != HIERARCHICAL]
    if which == "smoke":
        rows = [
            (name, METHODS[-1 - place % 3], ("int8", "balanced")[place % 2], "groupnorm")
            for place, name in enumerate(ours)
        ]
        rows += [("fednova", "pfedpara", "none", "batchnorm")]
    else:
        rows = [(*row, "groupnorm") for row in product(ours, METHODS, CODECS)]
        rows += [
            (*row, "batchnorm")
            for row in product(ours, ("none", "fedpara", "pfedpara"), ("none", "int8"))
        ]
    rows += [(HIERARCHICAL, method, "none", "groupnorm") for method in ("none", "fedpara")]
    return [Cell("fedml", environment_name, *row) for row in dict.fromkeys(rows)]
