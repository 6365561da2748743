"""Golden weights for both frameworks: the result of a plain loop in torch, in a file.

Flower and FedML cannot share an environment, so each run is compared with the file. Neither
framework is imported here, and of the plugin only the conversion of the model is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import silu

from fedpara_plugins import ModelSpec, convert
from harness.oracles.fedml_rules import ALGORITHMS, PlainLoop
from harness.oracles.task import TrainingTask

__all__ = ["CASES", "FILE", "METHODS", "OPTIONS", "TASK", "TOLERANCE", "TruthNet", "check", "loop"]

FILE = Path(__file__).parents[2] / "golden" / "weights.safetensors"
METHODS = ("none", "fedpara", "pfedpara")
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "fedpara": {"gamma": 0.3, "variance": "torch", "speed": 0.5},
    "pfedpara": {"gamma": 0.3, "variance": "torch", "speed": 0.25, "private_speed": 0.2},
}
"""Options of each method beside it. Slow factors keep two correct runs close, without a clip."""
TASK = TrainingTask(rounds=4, epochs=1, lr=0.1)
TOLERANCE = 5e-6
"""Largest difference of a weight; all compute in float32, and sum in different orders."""

State = Mapping[str, Tensor]


class TruthNet(nn.Module):
    """A small CNN for 8x8 images; smooth, and small enough for its weights to lie in a repository.

    conv2 and fc1 are factorised; conv1 and fc2 are too small.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(16 * 2 * 2, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = silu(self.conv1(images))  # [n, 8, 4, 4]
        x = silu(self.conv2(x))  # [n, 16, 2, 2]
        x = silu(self.fc1(x.flatten(1)))  # [n, 32]
        logits: Tensor = self.fc2(x)  # [n, 10]
        return logits


@dataclass(frozen=True)
class GoldenCase:
    """One optimizer, under the keys of both frameworks.

    Attributes:
        algorithm: a name in `ALGORITHMS`.
        keys: keys of the plain loop.
        fedml: keys of FedML's YAML.
        flower: the strategy's class.
        options: arguments of the strategy's constructor.
    """

    algorithm: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    fedml: Mapping[str, Any] = field(default_factory=dict)
    flower: str = "FedAvg"
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "fedavg": GoldenCase("FedAvg", fedml={"federated_optimizer": "FedAvg"}),
    "fedprox": GoldenCase(
        "FedProx",
        {"fedprox_mu": 0.2},
        {"federated_optimizer": "FedProx", "fedprox_mu": 0.2},
        "FedProx",
        {"proximal_mu": 0.2},
    ),
    "fedadam": GoldenCase(
        "flower adam",
        {"server_lr": 0.02, "tau": 0.01},
        {
            "federated_optimizer": "FedOpt",
            "server_optimizer": "adam",
            "server_lr": 0.02,
            "fedpara_server_rule": "flower",
            "fedpara_server_tau": 0.01,
        },
        "FedAdam",
        {"eta": 0.02, "tau": 0.01},
    ),
    "scaffold": GoldenCase(
        "SCAFFOLD",
        fedml={"federated_optimizer": "SCAFFOLD", "fedpara_guard": False},
        flower="Scaffold",
        options={"guard": None},
    ),
}


def net() -> TruthNet:
    """Build the model with the initial weights of the task."""
    torch.manual_seed(TASK.seed)
    return TruthNet()


def loop(name: str, method: str) -> State:
    """Run the plain loop, and return its shared weights."""
    case = CASES[name]
    model = convert(net(), method=method, **OPTIONS[method])
    private = ModelSpec.of(model).initial_private()

    class OfTask(ALGORITHMS[case.algorithm]):  # type: ignore[misc]
        def batches(self, client: int) -> Any:
            return list(TASK.batches(client, self.number + 1))

        def size(self, client: int) -> int:
            return TASK.size(client)

    clients: Mapping[int, Any] = dict.fromkeys(range(TASK.clients), ())
    made: PlainLoop = OfTask(model, clients, private=private, lr=TASK.lr, **case.keys)
    return made.run(TASK.rounds, TASK.clients)


def check(name: str, method: str, found: State) -> None:
    """Assert that a run's shared weights are those of the file."""
    prefix = f"{name}/{method}/"
    wanted = {
        key.removeprefix(prefix): value
        for key, value in load_file(FILE).items()
        if key.startswith(prefix)
    }
    assert wanted
    assert wanted.keys() <= found.keys()
    private = found.keys() - wanted.keys()
    assert bool(private) == (method == "pfedpara")
    assert not any(bool(found[key].any()) for key in private)
    for key, value in wanted.items():
        far = float((found[key].double() - value.double()).abs().max())
        assert far <= TOLERANCE, f"{name}, {method}: {key} is off by {far:.1e}"


def write() -> None:
    """Compute all cases and write the file."""
    states = {
        f"{name}/{method}/{key}": value.contiguous()
        for name, method in product(CASES, METHODS)
        for key, value in loop(name, method).items()
    }
    FILE.parent.mkdir(exist_ok=True)
    save_file(states, FILE)
