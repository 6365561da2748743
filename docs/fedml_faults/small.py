"""Shared parts of the reproductions: a project of FedML with two clients and one weight.

They need FedML and torch alone. A client's "training" adds a number to the weight, so that you can
compute the right result in your head. Everything around the training is FedML's own code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from fedml.core import mlops
from torch import Tensor, nn

__all__ = ["CPU", "Fault", "arguments", "dataset", "one_weight", "report", "weight"]

CPU = torch.device("cpu")
Loader = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Fault:
    """The result of a reproduction.

    Attributes:
        found: what FedML does.
        right: what it should do.
        present: whether the two differ; False once the fault is repaired.
    """

    found: str
    right: str
    present: bool


def arguments(optimizer: str, **keys: Any) -> SimpleNamespace:
    """Return the arguments of a FedML run of one round with both clients."""
    common: dict[str, Any] = {
        "training_type": "simulation",
        "backend": "sp",
        "dataset": "digits",
        "federated_optimizer": optimizer,
        "client_num_in_total": 2,
        "client_num_per_round": 2,
        "comm_round": 1,
        "epochs": 1,
        "batch_size": 4,
        "client_optimizer": "sgd",
        "learning_rate": 1.0,
        "weight_decay": 0.0,
        "server_lr": 1.0,
        "initialize_all_clients": True,
        "frequency_of_the_test": 1,
        "enable_wandb": False,
        "using_mlops": False,
        "ci": 0,
    }
    args = SimpleNamespace(**{**common, **keys})
    mlops.pre_setup(args)  # as fedml.init() does; otherwise FedML loads a config with tracking on
    return args


def loader(seed: int, batches: int = 1) -> Loader:
    """Return batches of four examples with two features and two classes."""
    source = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(4, 2, generator=source), torch.randint(2, (4,), generator=source))
        for _ in range(batches)
    ]


def dataset(batches: int = 1) -> list[Any]:
    """Return FedML's tuple of eight for two clients with equally many examples."""
    train = {client: loader(client, batches) for client in range(2)}
    test = {client: loader(client + 10) for client in range(2)}
    sizes = dict.fromkeys(range(2), 4 * batches)
    return [8 * batches, 8, train[0] + train[1], test[0] + test[1], sizes, train, test, 2]


def one_weight() -> nn.Module:
    """Return a linear layer of two features and two classes, with all weights zero."""
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    return model


def weight(model: nn.Module) -> float:
    """Return the first entry of the model's first parameter."""
    return round(float(next(model.parameters()).detach().flatten()[0]), 6)


def report(*reproductions: Callable[[], Fault]) -> None:
    """Run the reproductions and print what they found."""
    logging.disable(logging.INFO)
    for reproduce in reproductions:
        fault = reproduce()
        print(f"{reproduce.__name__}: {'present' if fault.present else 'REPAIRED'}")
        print(f"    FedML: {fault.found}\n    right: {fault.right}")
