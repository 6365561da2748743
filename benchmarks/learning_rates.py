"""Learning-rate sweeps of dense and factorised models side by side.

    python benchmarks/learning_rates.py [--steps 80] [--seeds 2]

A small CNN on scikit-learn's digits, trained on one machine, with and without GroupNorm, by SGD,
SGD with momentum 0.9, and Adam. Each entry is the mean training loss of the last ten steps over the
seeds; `x` is a loss that became NaN or stayed above that of guessing (2.3). The same learning rate
stands in one column for all methods: that is what a user carries over.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import product

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedpara_plugins as fedpara

COMMON = {"gamma": 0.1, "variance": "torch", "private_speed": 0.2, "clip": "none"}
LOWRANK = {**COMMON, "method": "lowrank", "speed": 0.25}
FEDPARA = {**COMMON, "method": "fedpara", "speed": 0.5}
PFEDPARA = {**COMMON, "method": "pfedpara", "speed": 0.25}
METHODS: dict[str, dict[str, object]] = {
    "dense": {"method": "none"},
    "lowrank": LOWRANK,
    "fedpara": FEDPARA,
    "fedpara, clip 1": {**FEDPARA, "clip": 1.0},
    "pfedpara": PFEDPARA,
    "pfedpara, clip 1": {**PFEDPARA, "clip": 1.0},
}
Build = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Build, tuple[float, ...]]] = {
    "SGD": (lambda p, lr: torch.optim.SGD(p, lr=lr), (0.03, 0.1, 0.2, 0.4, 0.8)),
    "SGD, momentum 0.9": (
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
        (0.003, 0.01, 0.03, 0.06, 0.1),
    ),
    "Adam": (lambda p, lr: torch.optim.Adam(p, lr=lr), (0.0003, 0.001, 0.003, 0.01, 0.03)),
}
GUESSING = math.log(10)


def net(norm: bool) -> nn.Module:
    """Build two convolutions and two linear layers, 0.2 M parameters."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)]
        return [*layers, *([nn.GroupNorm(8, outputs)] if norm else []), nn.ReLU()]

    convolutions = [*block(1, 32, 1), *block(32, 64, 2), *block(64, 64, 1)]
    return nn.Sequential(
        *convolutions, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def final_loss(
    options: dict[str, object], build: Build, lr: float, norm: bool, steps: int, seed: int
) -> float:
    """Return the mean loss of the last ten steps."""
    torch.manual_seed(seed)
    model = fedpara.convert(net(norm), **options)
    optimizer = build(list(model.parameters()), lr)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels: Tensor = torch.tensor(digits.target)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(labels), (50,))
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def main() -> None:
    """Print a table for each optimizer and net."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for (name, (build, rates)), norm in product(OPTIMIZERS.items(), (False, True)):
        print(f"\n{name}, {'GroupNorm' if norm else 'no norm'}\n")
        print("| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
        print("| --- |" + " ---: |" * len(rates))
        for method, how in METHODS.items():
            row = []
            for rate in rates:
                runs = range(options.seeds)
                losses = [final_loss(how, build, rate, norm, options.steps, s) for s in runs]
                mean = sum(losses) / len(losses)
                row.append(f"{mean:.2f}" if mean < GUESSING else "x")
            print(f"| {method} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
