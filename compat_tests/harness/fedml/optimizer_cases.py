"""The cases of FedML's optimizers: the project's keys, the run, and the plain loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fedpara_plugins import ModelSpec, convert
from harness.fedml.project import dataset, run
from harness.oracles.fedml_rules import ALGORITHMS, PlainLoop

__all__ = [
    "A_ROUND",
    "CASES",
    "CLIENTS",
    "GAMMA",
    "METHODS",
    "ROUNDS",
    "OptimizerCase",
    "assert_same",
    "batch_model",
    "published_loop",
    "run_case",
    "with_keys",
]

ROUNDS, A_ROUND, CLIENTS = 6, 2, 4
GAMMA = 0.5
METHODS = ("none", "fedpara", "pfedpara")


@dataclass(frozen=True)
class OptimizerCase:
    """One optimizer under keys of its own.

    Attributes:
        optimizer: FedML's ``federated_optimizer``.
        keys: keys of the YAML.
        algorithm: a name in `ALGORITHMS`; the optimizer's own if empty.
        more: keys of the plain loop that differ from the YAML's.
        atol: absolute tolerance of a weight.
    """

    optimizer: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    algorithm: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    atol: float = 2e-6


FLOWER = {"fedpara_server_rule": "flower"}
NO_GUARD = {"fedpara_guard": False}
CASES = {
    "fedavg": OptimizerCase("FedAvg"),
    "fedprox": OptimizerCase("FedProx", {"fedprox_mu": 0.5}),
    "fedopt-sgd": OptimizerCase("FedOpt", {"server_optimizer": "sgd", "server_lr": 0.7}),
    "fedopt-momentum": OptimizerCase(
        "FedOpt", {"server_optimizer": "sgd", "server_lr": 0.5, "server_momentum": 0.6}
    ),
    "fedopt-adam": OptimizerCase(
        "FedOpt",
        {"server_optimizer": "adam", "server_lr": 0.02, "fedpara_server_tau": 1e-3},
        more={"eps": 1e-3},
    ),
    "fedopt-adagrad": OptimizerCase(
        "FedOpt",
        {"server_optimizer": "adagrad", "server_lr": 0.02, "fedpara_server_tau": 1e-3},
        more={"eps": 1e-3},
    ),
    "fedopt-yogi": OptimizerCase(
        "FedOpt",
        {"server_optimizer": "yogi", "server_lr": 0.02},
        "published yogi",
        {"tau": 1e-3},
    ),
    "fedopt-flower-adam": OptimizerCase(
        "FedOpt",
        {"server_optimizer": "adam", "server_lr": 0.02, **FLOWER},
        "flower adam",
        {"tau": 1e-3},
    ),
    "fedopt-flower-yogi": OptimizerCase(
        "FedOpt",
        {"server_optimizer": "yogi", "server_lr": 0.02, "fedpara_server_tau": 1e-2, **FLOWER},
        "flower yogi",
        {"tau": 1e-2},
    ),
    "fedopt-flower-adagrad": OptimizerCase(
        "FedOpt",
        {"server_optimizer": "adagrad", "server_lr": 0.02, "fedpara_server_tau": 1e-2, **FLOWER},
        "flower adagrad",
        {"tau": 1e-2},
    ),
    "scaffold": OptimizerCase("SCAFFOLD", NO_GUARD),
    "scaffold-rate": OptimizerCase("SCAFFOLD", {"server_lr": 0.5, **NO_GUARD}),
    "scaffold-one": OptimizerCase(
        "SCAFFOLD", {"fedpara_scaffold_option": "I", **NO_GUARD}, more={"option": "I"}
    ),
    "feddyn": OptimizerCase("FedDyn", {"feddyn_alpha": 0.5}),
    "fednova": OptimizerCase("FedNova", {}),
    "fednova-momentum": OptimizerCase(
        "FedNova",
        {
            "momentum": 0.8,
            "gmf": 0.3,
            "wd": 0.01,
            "learning_rate": 0.05,
            "fedpara_decay": "factors",
        },
    ),
    "fednova-proximal": OptimizerCase("FedNova", {"mu": 0.5}),
    "fednova-all": OptimizerCase(
        "FedNova",
        {"momentum": 0.5, "nesterov": True, "mu": 0.5, "gmf": 0.3, "learning_rate": 0.05},
    ),
    "fednova-dampening": OptimizerCase(
        "FedNova", {"momentum": 0.5, "dampening": 0.2, "learning_rate": 0.05}
    ),
    "mime": OptimizerCase("Mime", {"server_optimizer": "sgd", "server_momentum": 0.5}),
    "mime-adam": OptimizerCase(
        "Mime",
        {"server_optimizer": "adam", "learning_rate": 0.005, "fedpara_server_tau": 1e-2},
        more={"tau": 1e-2},
    ),
    "mimelite": OptimizerCase(
        "Mime", {"server_optimizer": "sgd", "server_momentum": 0.5, "mimelite": True}
    ),
}


def batch_model() -> nn.Module:
    """Build a model with BatchNorm: float and integer buffers in the state."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(),
        nn.Linear(48, 4),
    )  # fmt: skip


def published_loop(
    case: OptimizerCase,
    method: str,
    net: nn.Module,
    epochs: int = 2,
    smoothing: float = 0.0,
    options: Mapping[str, Any] = {},
    **more: Any,
) -> PlainLoop:
    """Build the published algorithm in plain torch.

    Args:
        case: the optimizer.
        method: method of the conversion.
        net: the model, dense.
        epochs: a client's epochs in a round.
        smoothing: smoothing of the labels.
        options: options of the conversion.
        more: arguments of `PlainLoop`.
    """
    net = convert(net, method=method, gamma=GAMMA, **options)
    keys = {k: v for k, v in case.keys.items() if not k.startswith("fedpara_")}
    return ALGORITHMS[case.algorithm or case.optimizer](
        net,
        dataset(CLIENTS)[5],
        private=ModelSpec.of(net).initial_private(),
        epochs=epochs,
        lr=keys.pop("learning_rate", 0.1),
        smoothing=smoothing,
        **{**keys, **case.more, **more},
    )


def run_case(case: OptimizerCase, method: str, net: nn.Module, **more: Any) -> Any:
    """Run FedML's project with the plugin's keys."""
    keys: dict[str, Any] = {
        "federated_optimizer": case.optimizer,
        "comm_round": ROUNDS,
        "client_num_in_total": CLIENTS,
        "client_num_per_round": A_ROUND,
        "epochs": 2,
        "frequency_of_the_test": 100,
        "fedpara_mend": True,
        "fedpara_method": method,
        "fedpara_gamma": GAMMA,
    }
    given = {"net": net, "data": dataset(CLIENTS)}
    return run(**{**given, **keys, **case.keys, **more})


State = Mapping[str, torch.Tensor]


def assert_same(found: State, wanted: State, atol: float = 2e-6) -> None:
    """Assert that all wanted tensors are found, up to rounding."""
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=atol, msg=lambda said, name=name: f"{name}: {said}"
        )


def with_keys(name: str, **keys: Any) -> OptimizerCase:
    """Return a case with further or other keys, ``federated_optimizer`` included."""
    case = CASES[name]
    optimizer = keys.pop("federated_optimizer", case.optimizer)
    return replace(case, optimizer=optimizer, keys={**case.keys, **keys})
