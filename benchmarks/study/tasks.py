"""Tasks: a model, and real data divided among clients.

The data sets lie in a folder beside the repository and are never part of it. `TASKS` names the
tasks; `load` reads one.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import networks
import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["TASKS", "Share", "Task", "load"]

Share = tuple[Tensor, Tensor]
"""Inputs and their classes."""


@dataclass(frozen=True)
class Task:
    """A model to train, and who has which data.

    Attributes:
        build: returns a fresh dense model, drawn from torch's global generator.
        clients: each client's data for training.
        test: what the server's model is judged by.
        own: each client's held-out data, for what stays on it; empty where nobody asks.
        rate: dense's own learning rate of SGD on this task.
        epochs: passes over a client's data in a round.
        batch: examples of a step.
        sampled: clients of a round.
        before: what a pretrained model has seen; None where training starts from nothing.
    """

    build: Callable[[], nn.Module]
    clients: Sequence[Share]
    test: Share
    own: Sequence[Share] = ()
    rate: float = 0.1
    epochs: int = 1
    batch: int = 32
    sampled: int = 10
    before: Share | None = field(default=None, repr=False)


def load(name: str, folder: Path, seed: int) -> Task:
    """Return a task.

    Args:
        name: one of `TASKS`.
        folder: with the data sets.
        seed: of the division among clients.

    Raises:
        SystemExit: a data set is missing.
    """
    try:
        return TASKS[name](folder, np.random.default_rng(seed))
    except FileNotFoundError as error:
        raise SystemExit(
            f"{error.filename} is missing: give the folder of the data sets with --data FOLDER "
            f"(they are not part of this repository)"
        ) from None


def fashion(folder: Path, draw: np.random.Generator, *, norms: bool, alpha: float | None) -> Task:
    """Return Fashion-MNIST: 100 clients with 256 images each.

    Args:
        folder: with the data sets.
        draw: for the division.
        norms: whether the model has GroupNorm.
        alpha: of Dirichlet's distribution of the clients' classes; None for none.
    """
    with np.load(folder / "fashion_mnist.npz") as z:
        x, y, test = z["x_train"], z["y_train"], (z["x_test"], z["y_test"])
    parts = divide(y, 100, 256, alpha, draw)
    return Task(
        build=lambda: networks.small_cnn(norms=norms),
        clients=[(grey(x[part]), classes(y[part])) for part in parts],
        test=(grey(test[0][:5000]), classes(test[1][:5000])),
    )


def cifar(folder: Path, draw: np.random.Generator, *, alpha: float | None) -> Task:
    """Return CIFAR-10: 100 clients with 256 images each, a small VGG with GroupNorm."""
    x, y = cifar_part(folder, "train_a")
    parts = divide(y, 100, 256, alpha, draw) if alpha else divide(y, 100, 250, None, draw)
    test = cifar_part(folder, "test")
    return Task(
        build=networks.small_vgg,
        clients=[(colour(x[part]), classes(y[part])) for part in parts],
        test=(colour(test[0][:5000]), classes(test[1][:5000])),
        epochs=2,
    )


def pretrained(folder: Path, draw: np.random.Generator) -> Task:
    """Return CIFAR-10, one half for a pretrained model, the other on 50 skewed clients.

    The clients' classes follow Dirichlet's distribution with 0.3; a fifth of each client's images
    is held out.
    """
    before, (x, y) = cifar_part(folder, "train_a"), cifar_part(folder, "train_b")
    test = cifar_part(folder, "test")
    parts = divide(y, 50, 300, 0.3, draw)
    return Task(
        build=networks.small_vgg,
        clients=[(colour(x[part[60:]]), classes(y[part[60:]])) for part in parts],
        own=[(colour(x[part[:60]]), classes(y[part[:60]])) for part in parts],
        test=(colour(test[0][:5000]), classes(test[1][:5000])),
        rate=0.03,
        before=(colour(before[0]), classes(before[1])),
    )


def writers(folder: Path, draw: np.random.Generator) -> Task:
    """Return MNIST by writers: 60 of them, a quarter of each one's digits held out, an MLP."""
    with np.load(folder / "mnist_writers.npz") as z:
        x, y, writer = z["x_train"], z["y_train"], z["writer_train"]
        test = z["x_test"], z["y_test"]
    chosen = [np.flatnonzero(writer == u) for u in np.unique(writer)]
    chosen = [draw.permutation(part) for part in chosen if len(part) >= 100]
    parts = [chosen[i] for i in draw.permutation(len(chosen))[:60]]
    return Task(
        build=networks.mlp,
        clients=[(grey(x[p[len(p) // 4 :]]), classes(y[p[len(p) // 4 :]])) for p in parts],
        own=[(grey(x[p[: len(p) // 4]]), classes(y[p[: len(p) // 4]])) for p in parts],
        test=(grey(test[0]), classes(test[1])),
        epochs=2,
        sampled=12,
    )


def activities(folder: Path, draw: np.random.Generator) -> Task:
    """Return human activities by subjects: 30 of them, a quarter held out, a 1-D CNN."""
    with np.load(folder / "uci_har_subjects.npz") as z:
        x, y, subject = z["x"], z["y"], z["subject"]
    x = np.ascontiguousarray(x.transpose(0, 2, 1))
    y = y - y.min()
    parts = [draw.permutation(np.flatnonzero(subject == u)) for u in np.unique(subject)]
    held = [part[: len(part) // 4] for part in parts]
    return Task(
        build=networks.signal_cnn,
        clients=[
            (torch.from_numpy(x[p[len(p) // 4 :]]), classes(y[p[len(p) // 4 :]])) for p in parts
        ],
        own=[(torch.from_numpy(x[p]), classes(y[p])) for p in held],
        test=(torch.from_numpy(x[np.concatenate(held)]), classes(y[np.concatenate(held)])),
        rate=0.03,
    )


def roles(folder: Path, draw: np.random.Generator) -> Task:
    """Return Shakespeare by roles: next characters of 100 of them in lines of 80, an LSTM."""
    with gzip.open(folder / "shakespeare_roles.json.gz", "rt") as file:
        texts = [user["text"] for user in json.load(file)["users"] if len(user["text"]) > 3000]
    alphabet = {char: i for i, char in enumerate(sorted({c for text in texts for c in text}))}
    chosen = [texts[i][:12000] for i in draw.permutation(len(texts))[:100]]
    lines = []
    for text in chosen:
        codes = torch.tensor([alphabet[c] for c in text])
        codes = codes[: (len(codes) - 1) // 80 * 80 + 1]
        lines.append((codes[:-1].view(-1, 80), codes[1:].view(-1, 80)))
    cut = [max(1, len(x) // 10) for x, _ in lines]
    return Task(
        build=lambda: networks.characters(len(alphabet)),
        clients=[(x[n:], y[n:]) for (x, y), n in zip(lines, cut, strict=True)],
        test=(
            torch.cat([x[:n] for (x, _), n in zip(lines, cut, strict=True)]),
            torch.cat([y[:n] for (_, y), n in zip(lines, cut, strict=True)]),
        ),
        rate=1.0,
        batch=10,
    )


def divide(
    labels: np.ndarray, clients: int, size: int, alpha: float | None, draw: np.random.Generator
) -> list[np.ndarray]:
    """Return each client's places in the data, without repetition.

    Args:
        labels: class of each example.
        clients: their number.
        size: examples of each.
        alpha: of Dirichlet's distribution over classes (Hsu et al. 2019); None for equal parts.
        draw: the generator.
    """
    if alpha is None:
        order = draw.permutation(len(labels))
        return [order[i * size : (i + 1) * size] for i in range(clients)]
    kinds = int(labels.max()) + 1
    left = [list(draw.permutation(np.flatnonzero(labels == k))) for k in range(kinds)]
    parts = []
    for _ in range(clients):
        shares = draw.dirichlet([alpha] * kinds)
        part: list[int] = []
        while len(part) < size:
            have = np.array([bool(places) for places in left])
            weights = np.where(have, shares + 1e-9, 0)
            kind = int(draw.choice(kinds, p=weights / weights.sum()))
            part.append(left[kind].pop())
        parts.append(draw.permutation(np.array(part)))
    return parts


def grey(x: np.ndarray) -> Tensor:
    """Return grey images as values around 0, shape (N, 1, H, W)."""
    return (torch.from_numpy(x).float().unsqueeze(1) / 255 - 0.2860) / 0.3530


def colour(x: np.ndarray) -> Tensor:
    """Return colour images as values around 0, shape (N, 3, H, W)."""
    return (torch.from_numpy(x).float() / 255 - 0.473) / 0.251


def classes(y: np.ndarray) -> Tensor:
    """Return classes as torch wants them."""
    return torch.from_numpy(y).long()


def cifar_part(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images and classes of one of CIFAR-10's files."""
    with np.load(folder / f"cifar10_{name}.npz") as z:
        return z["d"], z["y"]


TASKS: dict[str, Callable[[Path, np.random.Generator], Task]] = {
    "fashion": lambda folder, draw: fashion(folder, draw, norms=False, alpha=None),
    "fashion, norms": lambda folder, draw: fashion(folder, draw, norms=True, alpha=None),
    "fashion, dirichlet": lambda folder, draw: fashion(folder, draw, norms=False, alpha=0.5),
    "cifar": lambda folder, draw: cifar(folder, draw, alpha=None),
    "cifar, pretrained": pretrained,
    "writers": writers,
    "activities": activities,
    "roles": roles,
}
