"""The accuracy that a fit of trained weights costs, and what training brings back.

    python benchmarks/fit.py [--steps 150] [--data FOLDER]

A small CNN is trained dense, converted with ``init="fit"`` and trained on for as many steps again.
The task is scikit-learn's digits, or Fashion-MNIST if a folder with ``fashion_mnist.npz`` is given.
Printed are the accuracies on held-out images and the median and worst relative error of the fit.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedpara_plugins as fedpara

METHODS = ("lowrank", "fedpara", "pfedpara")
SPEEDS = {
    "lowrank": {"speed": 0.25},
    "fedpara": {"speed": 0.5},
    "pfedpara": {"speed": 0.25, "private_speed": 0.2},
}
GAMMAS = (0.1, 0.3, 0.6)
BATCH = 64


def net(size: int) -> nn.Module:
    """Build three convolutions and two linear layers for square images of this size."""
    half = (size + 1) // 2
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * ((half + 1) // 2) ** 2, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )


def images(folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels for training, then for tests."""
    if folder is None:
        x, y = load_digits(return_X_y=True)
        x, y = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        return x[order[400:]], y[order[400:]], x[order[:400]], y[order[:400]]
    with np.load(folder / "fashion_mnist.npz") as arrays:
        by_size = sorted(arrays.files, key=lambda name: -len(arrays[name]))
        found = {name: torch.tensor(arrays[name]) for name in by_size}
    (train, test) = (v for v in found.values() if v.dim() >= 3)
    (train_y, test_y) = (v for v in found.values() if v.dim() == 1)
    return (
        *(train.float().view(-1, 1, 28, 28) / 255, train_y.long()),
        *(test.float().view(-1, 1, 28, 28)[:2000] / 255, test_y.long()[:2000]),
    )


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """Train by SGD with momentum, the gradient's norm bounded by 1."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,), generator=draw)
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers in percent."""
    return 100 * float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--data", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    x, y, test_x, test_y = images(chosen.data)
    torch.manual_seed(0)
    dense = train(net(x.shape[-1]), x, y, chosen.steps)
    before = accuracy(dense, test_x, test_y)
    on = accuracy(train(copy.deepcopy(dense), x, y, chosen.steps), test_x, test_y)
    print(f"dense: {before:.1f}, trained on {on:.1f}")
    print("method, gamma: fitted, trained on; median and worst error")
    for method in METHODS:
        for gamma in GAMMAS:
            options = {"gamma": gamma, "init": "fit", "clip": "none", **SPEEDS[method]}
            model = fedpara.convert(copy.deepcopy(dense), method=method, **options)
            errors = [e for r in fedpara.report(model).rows if (e := r.fit_error) is not None]
            after = accuracy(model, test_x, test_y)
            on = accuracy(train(model, x, y, chosen.steps), test_x, test_y)
            print(
                f"{method}, {gamma}: {after:.1f}, {on:.1f}; {median(errors):.2f}, {max(errors):.2f}"
            )


if __name__ == "__main__":
    main()
