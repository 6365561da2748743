"""Optimizers that FedML lacks in cross-silo and under `mpirun`: as published, over a transport."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedpara_plugins as fedpara
from fedpara_plugins import ModelSpec
from harness.fedml.deployment import FedMLDeployment, Net, digits
from harness.fedml.requirements import skip_without
from harness.oracles.fedml_rules import ALGORITHMS

Keys = Mapping[str, Any]
State = Mapping[str, Tensor]

OPTIMIZERS: Mapping[str, tuple[Keys, Keys, Keys]] = {
    "FedProx": ({"fedprox_mu": 1.0}, {}, {}),
    # With a constant in Adam's root at which rounding stays what it is.
    "FedOpt": (
        {"server_optimizer": "adam", "server_lr": 0.01},
        {"server_tau": 1e-2},
        {"eps": 1e-2},
    ),
    "SCAFFOLD": ({"server_lr": 1.0}, {"guard": False}, {}),
    "FedDyn": ({"feddyn_alpha": 0.3}, {}, {}),
}
"""Keys of the YAML's ``train_args``, of the plugin, and others of the plain loop."""

FEDAVG: tuple[Keys, Keys, Keys] = ({}, {}, {})

ROUNDS, A_ROUND, LR, GAMMA = 4, 2, 0.01, 0.3
TOLERANCE = 5e-5
"""Weights that begin 1e-8 apart end up to 2e-5 apart at this rate: the network has kinks."""

AWAY = 2e-4
"""How far off another one of these algorithms ends at least."""


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_dense_in_cross_silo(tmp_path: Path, optimizer: str) -> None:
    """By the project's own key: method and codec are none, and no key asks for the engine."""
    keys, plugin, _ = OPTIMIZERS[optimizer]
    train = {"learning_rate": LR, "comm_round": ROUNDS, "federated_optimizer": optimizer, **keys}
    with FedMLDeployment(tmp_path, "TRPC", plugin=plugin, train=train) as engine:
        engine.finished()
    check(engine.final, optimizer, "none", silos=A_ROUND)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_factors_in_mpi_simulation(tmp_path: Path, optimizer: str) -> None:
    """Five silos on two processes: variates, duals and private factors follow the silo."""
    skip_without("MPI")
    keys, plugin, _ = OPTIMIZERS[optimizer]
    plugin = {**plugin, "method": "pfedpara", "gamma": GAMMA}
    train = {"learning_rate": LR, "comm_round": ROUNDS, "federated_optimizer": optimizer, **keys}
    train["client_num_in_total"] = 5
    common = {"training_type": "simulation"}
    with FedMLDeployment(tmp_path, "MPI", plugin=plugin, train=train, common=common) as engine:
        engine.finished()
    check(engine.final, optimizer, "pfedpara", silos=5)


def plain(optimizer: str, method: str, silos: int) -> State:
    """Return the dense weights of the published algorithm in plain torch."""
    keys, _, more = OPTIMIZERS.get(optimizer, FEDAVG)
    batches = {client: list(loader) for client, loader in digits.load(silos, 32)[5].items()}
    torch.manual_seed(0)  # FedML's random_seed
    model = fedpara.convert(Net(), method=method, gamma=GAMMA)
    private = ModelSpec.of(model).initial_private()
    loop = ALGORITHMS[optimizer](model, batches, private=private, lr=LR, **{**keys, **more})
    shared = loop.run(ROUNDS, A_ROUND)
    # The server's private half is zero, so that its model is W1.
    model.load_state_dict({**shared, **{k: torch.zeros_like(v) for k, v in private.items()}})
    return fedpara.to_dense(model).state_dict()


def check(found: State, optimizer: str, method: str, silos: int) -> None:
    assert distance(found, plain(optimizer, method, silos)) <= TOLERANCE
    assert distance(found, plain("FedAvg", method, silos)) > AWAY


def distance(found: State, wanted: State) -> float:
    """Return the largest difference of a weight."""
    assert found.keys() == wanted.keys()
    return max(float((found[k].double() - v.double()).abs().max()) for k, v in wanted.items())
