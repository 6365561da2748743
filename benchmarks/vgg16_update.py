"""An update of trained factors, to measure codecs on: VGG16 at gamma 0.1 on CIFAR-10.

    python benchmarks/vgg16_update.py --data FOLDER --output update.pt [--steps 300] [--local 40]

Trains factors from their initialisation for ``--steps`` steps of SGD, which gives the reference;
then a client, which holds the first 1,280 images of other data, goes on for ``--local`` steps.
FOLDER holds ``cifar10_train_a.npz`` with ``d`` (N, 3, 32, 32), the images as two-dimensional
differences with green subtracted from red and blue, and ``y`` (N,), both uint8.
"""

from __future__ import annotations

import argparse
import logging
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedpara_plugins as fedpara

__all__ = ["vgg16_factors"]

PLAN = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
BATCH = 32
CLIENT = 1280
_log = logging.getLogger(__name__)


def vgg16(classes: int = 10) -> nn.Sequential:
    """Build the paper's VGG16: 3x32x32 input, GroupNorm, linear layers 512-512-512-classes."""
    layers: list[nn.Module] = []
    width = 3
    for size in PLAN:
        if size == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(width, size, 3, padding=1), nn.GroupNorm(32, size), nn.ReLU()]
        width = size
    layers.append(nn.Flatten())
    for before, after in pairwise((512, 512, 512, classes)):
        linear = nn.Linear(before, after)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def vgg16_factors(seed: int = 0) -> nn.Module:
    """Build the same with convolutions factorised at gamma 0.1, stem and linear layers dense."""
    torch.manual_seed(seed)
    linear = ("45", "47", "49")
    return fedpara.convert(vgg16(), method="fedpara", gamma=0.1, exclude=("0", *linear), seed=seed)


def cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Load images (N, 3, 32, 32) of about unit variance, and labels (N,)."""
    with np.load(path) as file:
        pixels, labels = file["d"], file["y"]
    pixels = np.cumsum(np.cumsum(pixels, axis=3, dtype=np.uint8), axis=2, dtype=np.uint8)
    pixels[:, 0] += pixels[:, 1]
    pixels[:, 2] += pixels[:, 1]
    images = torch.from_numpy(pixels).float().sub_(120).div_(64)
    return images, torch.from_numpy(labels.astype(np.int64))


def train(
    model: nn.Module, images: Tensor, labels: Tensor, *, steps: int, rate: float, seed: int
) -> float:
    """Train with SGD and momentum; return the mean loss of the last tenth of the steps."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=draw)
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 19:
            seconds = (time.perf_counter() - start) / (step + 1)
            _log.info("step %d: loss %.3f, %.2f s a step", step + 1, np.mean(losses[-20:]), seconds)
    return float(np.mean(losses[-max(1, steps // 10) :]))


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copy the factors and everything else that travels."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def main() -> None:
    """Train, and save reference and update."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--local", type=int, default=40)
    parser.add_argument("--rate", type=float, default=0.005)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    images, labels = cifar(options.data / "cifar10_train_a.npz")
    model = vgg16_factors()
    others, own = slice(CLIENT, None), slice(0, CLIENT)
    train(model, images[others], labels[others], steps=options.steps, rate=options.rate, seed=1)
    reference = state(model)
    train(model, images[own], labels[own], steps=options.local, rate=options.rate, seed=2)
    torch.save({"reference": reference, "trained": state(model)}, options.output)


if __name__ == "__main__":
    main()
