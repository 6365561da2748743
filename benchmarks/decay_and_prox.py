"""Effects of weight decay and FedProx's mu on a composed weight, next to a dense one.

    python benchmarks/decay_and_prox.py

Weight decay: how much one step without a gradient shrinks W, in units of learning rate times
decay, dense = 1. Mu: a constant random gradient G and the proximal term mu/2 |w - w_global|² pull
on a weight until it rests; the term holds W as a dense weight is held by mu_dense, the value for
which the same displacement along G is left: mu_dense / mu, dense = 1. Both with SGD and AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import nn

import fedpara_plugins as fedpara

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear 256-256": lambda: nn.Linear(256, 256, bias=False),
    "Conv2d 64-64 3x3": lambda: nn.Conv2d(64, 64, 3, bias=False),
}
METHODS = ("none", "lowrank", "fedpara", "pfedpara")
OPTIMIZERS = (torch.optim.SGD, torch.optim.AdamW)
SPEEDS = {"lowrank": 0.25, "fedpara": 0.5, "pfedpara": 0.25}
COMMON = {"gamma": 0.3, "variance": "torch", "private_speed": 0.2, "clip": "none"}
DRAWS = 4
STEPS = 400
MU = 0.1


def build(name: str, method: str, decay: str) -> nn.Module:
    """Build a fresh layer; of pFedPara only the shared factors are trained."""
    layer = LAYERS[name]()
    if method == "none":
        return layer
    options = {**COMMON, "method": method, "speed": SPEEDS[method], "decay": decay}
    layer = fedpara.convert(layer, **options)
    for key, parameter in layer.named_parameters():
        parameter.requires_grad_(not (method == "pfedpara" and key.endswith("2")))
    return layer


def shrinking(layer: nn.Module, optimizer: type[torch.optim.Optimizer]) -> float:
    """Return the relative loss of W in one step without gradient, per learning rate and decay."""
    before = layer.weight.detach().clone()
    trained = [p for p in layer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer(trained, lr=0.01, weight_decay=0.1).step()
    kept = (layer.weight.detach() * before).sum() / before.square().sum()
    return float(1 - kept) / 0.001


def held_back(layer: nn.Module, optimizer: type[torch.optim.Optimizer]) -> float:
    """Return mu_dense / mu at rest, from the displacement under a small constant gradient."""
    before = layer.weight.detach().clone()
    gradient = torch.randn_like(before) * 0.01 * MU * before.std()
    trained = [p for p in layer.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    sgd = optimizer is torch.optim.SGD
    made = optimizer(trained, lr=0.5 if sgd else 1e-5, weight_decay=0.0)
    for step in range(STEPS):
        made.zero_grad()
        near = sum((p - s).square().sum() for p, s in zip(trained, start, strict=True))
        ((layer.weight * gradient).sum() + MU / 2 * near).backward()
        if not sgd:  # without smaller steps Adam would circle around the place of rest
            made.param_groups[0]["lr"] = 3e-4 * start[0].std().item() * (1 - step / STEPS) ** 2
        made.step()
    moved = layer.weight.detach() - before
    return float(gradient.square().sum() / -(moved * gradient).sum()) / MU


def main() -> None:
    """Print both tables."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| layer | method | decay | SGD | AdamW |")
    print("| --- | --- | --- | ---: | ---: |")
    for name, method, decay in product(LAYERS, METHODS, ("factors", "composed")):
        if method != "none" or decay == "factors":
            figures = [shrinking(build(name, method, decay), kind) for kind in OPTIMIZERS]
            shown = "-" if method == "none" else decay
            print(f"| {name} | {method} | {shown} | {figures[0]:.2f} | {figures[1]:.2f} |")
    print()
    print("| layer | method | K | mu_dense / mu, SGD | AdamW | 1 / K |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, method in product(LAYERS, METHODS):
        speed = SPEEDS.get(method, 1.0)
        figures = [
            sum(held_back(build(name, method, "composed"), kind) for _ in range(DRAWS)) / DRAWS
            for kind in OPTIMIZERS
        ]
        row = f"| {figures[0]:.2f} | {figures[1]:.2f} | {1 / speed:.0f} |"
        print(f"| {name} | {method} | {speed} {row}", flush=True)


if __name__ == "__main__":
    main()
