"""Movement of a composed weight in one optimizer step, next to a dense one.

    python benchmarks/step_size.py

For random gradients G by the weight. SGD: movement along -G per unit of learning rate, dense = 1;
the formula says K. Adam: root mean square of the movement in units of the learning rate, dense = 1;
to first order, with signs independent of the factors, it would be the square root of K.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

import fedpara_plugins as fedpara

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear 256-256": lambda: nn.Linear(256, 256),
    "Conv2d 64-64 3x3": lambda: nn.Conv2d(64, 64, 3),
}
METHODS = ("lowrank", "fedpara", "pfedpara")
SPEEDS = (0.25, 0.5, 1.0)
DRAWS = 8


def movement(
    layer: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]
) -> tuple[float, float]:
    """Return slope along -G and root mean square of a step's movement divided by the rate."""
    rate = 1e-5
    before = layer.weight.detach().clone()
    gradient = torch.randn_like(before)
    (layer.weight * gradient).sum().backward()
    optimizer(layer.parameters(), lr=rate).step()
    moved: Tensor = (layer.weight.detach() - before) / rate
    slope = -(moved * gradient).sum() / gradient.square().sum()
    return float(slope), float(moved.square().mean().sqrt())


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| layer | method | K | SGD, along -G | Adam, rms | rms / sqrt K |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for (name, build), method, speed in product(LAYERS.items(), METHODS, SPEEDS):
        slopes, sizes = [], []
        for _ in range(DRAWS):
            for values, kind, index in ((slopes, torch.optim.SGD, 0), (sizes, torch.optim.Adam, 1)):
                options = {"private_speed": 1e-6} if method == "pfedpara" else {}
                layer = fedpara.convert(build(), method=method, gamma=0.3, speed=speed, **options)
                values.append(movement(layer, kind)[index])
        slope, size = (sum(values) / DRAWS for values in (slopes, sizes))
        print(
            f"| {name} | {method} | {speed} | {slope:.2f} | {size:.2f} | {size / speed**0.5:.2f} |"
        )


if __name__ == "__main__":
    main()
