"""Tasks: a model, and real data divided among clients.

The data sets lie in a folder beside the repository and are never part of it. `TASKS` names the
tasks; `load` reads one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import networks
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

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
        rate: dense's own learning rate of SGD on this task.
        own: each client's held-out data, for what stays on it; empty where nobody asks.
        sampled: clients of a round.
        batch: examples of a step of a client's.
        before: returns what a pretrained model has seen; None where training starts from nothing.
    """

    build: Callable[[], nn.Module]
    clients: Sequence[Share]
    test: Share
    rate: float
    own: Sequence[Share] = ()
    sampled: int = 10
    batch: int = 32
    before: Callable[[], Share] | None = None


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


def fashion(
    folder: Path,
    draw: np.random.Generator,
    build: Callable[[], nn.Module] = networks.small_cnn,
    alpha: float | None = None,
) -> Task:
    """Return Fashion-MNIST: 100 clients with 256 images each.

    Args:
        folder: with the data sets.
        draw: the generator.
        build: returns the model.
        alpha: of Dirichlet's distribution over a client's classes; None for all classes alike.
    """
    x, y, *test = fashion_mnist(folder)
    parts = (
        list(draw.permutation(len(y))[: 100 * 256].reshape(100, 256))
        if alpha is None
        else divide(y, 100, 256, alpha, draw)
    )
    return Task(
        build=build,
        clients=[(grey(x[part]), classes(y[part])) for part in parts],
        test=(grey(test[0][:5000]), classes(test[1][:5000])),
        rate=0.1,
    )


def turned(folder: Path, draw: np.random.Generator, alpha: float | None) -> Task:
    """Return Fashion-MNIST at 14x14: a model of upright images, clients whose images lie.

    The model has seen one half of the data, and 24 clients hold 240 images each of the other half,
    all turned by a quarter. So there is much to learn, and quickly.

    Args:
        folder: with the data sets.
        draw: the generator.
        alpha: of Dirichlet's distribution over a client's classes; None for all classes alike.
    """
    x, y, *test = fashion_mnist(folder)
    half = len(y) // 2
    parts = (
        list(draw.permutation(half)[: 24 * 240].reshape(24, 240))
        if alpha is None
        else divide(y[half:], 24, 240, alpha, draw)
    )

    def share(images: np.ndarray, labels: np.ndarray, turns: int) -> Share:
        halved = avg_pool2d(grey(images), 2)
        return torch.rot90(halved, turns, (2, 3)).contiguous(), classes(labels)

    return Task(
        build=networks.mlp,
        clients=[share(x[half:][part], y[half:][part], 1) for part in parts],
        test=share(test[0][:2000], test[1][:2000], 1),
        rate=0.05,
        sampled=6,
        before=lambda: share(x[:half], y[:half], 0),
    )


def pretrained(folder: Path, draw: np.random.Generator) -> Task:
    """Return CIFAR-10: a model of one half, and 50 skewed clients whose images are upside down.

    They hold 160 images each of the other half, of which 32 are held out. Their classes follow
    Dirichlet's distribution with 0.3. Upright images would leave nothing to learn: the model has
    seen 25,000 of them.
    """
    (x, y), test = cifar_part(folder, "train_b"), cifar_part(folder, "test")
    parts = divide(y, 50, 160, 0.3, draw)

    def share(images: np.ndarray, labels: np.ndarray) -> Share:
        return torch.rot90(colour(images), 2, (2, 3)).contiguous(), classes(labels)

    def before() -> Share:
        images, labels = cifar_part(folder, "train_a")
        return colour(images), classes(labels)

    return Task(
        build=networks.small_vgg,
        clients=[share(x[part[32:]], y[part[32:]]) for part in parts],
        own=[share(x[part[:32]], y[part[:32]]) for part in parts],
        test=share(test[0][:2000], test[1][:2000]),
        rate=0.03,
        batch=16,
        before=before,
    )


def motion(folder: Path, draw: np.random.Generator) -> Task:
    """Return HAR: 24 people are clients, 6 others are the test."""
    with np.load(folder / "uci_har_subjects.npz") as z:
        x, y, subject = z["x"], z["y"], z["subject"]
    scaled = (x - x.mean((0, 1))) / x.std((0, 1))
    inputs = torch.from_numpy(scaled).transpose(1, 2).contiguous()
    people = draw.permutation(np.unique(subject))

    def of(some: np.ndarray) -> Share:
        places = np.flatnonzero(np.isin(subject, some))
        return inputs[places], classes(y[places])

    return Task(
        build=networks.motion_cnn,
        clients=[of(person) for person in people[6:]],
        test=of(people[:6]),
        rate=0.05,
    )


def writers(folder: Path, draw: np.random.Generator) -> Task:
    """Return MNIST by writers: the 60 with the most digits, of which a quarter is held out."""
    with np.load(folder / "mnist_writers.npz") as z:
        writer = z["writer_train"]
    names, counts = np.unique(writer, return_counts=True)
    most = names[np.argsort(-counts, kind="stable")[:60]]
    return own_digits(folder, [draw.permutation(np.flatnonzero(writer == name)) for name in most])


def two_classes(folder: Path, draw: np.random.Generator) -> Task:
    """Return MNIST: 60 clients with 100 digits of each of two classes; a quarter is held out."""
    with np.load(folder / "mnist_writers.npz") as z:
        labels = z["y_train"]
    left = [list(draw.permutation(np.flatnonzero(labels == k))) for k in range(10)]
    parts = []
    for client in range(60):
        pair = (client % 10, (client + 1 + client // 10) % 10)
        parts.append(draw.permutation([left[k].pop() for k in pair for _ in range(100)]))
    return own_digits(folder, parts)


def own_digits(folder: Path, parts: Sequence[np.ndarray]) -> Task:
    """Return MNIST for clients that are judged by their own held-out digits.

    Args:
        folder: with the data sets.
        parts: each client's places in the training data; the first quarter is held out.
    """
    with np.load(folder / "mnist_writers.npz") as z:
        x, y, test = z["x_train"], z["y_train"], (z["x_test"], z["y_test"])

    def some(places: np.ndarray) -> Share:
        return grey(x[places]), classes(y[places])

    return Task(
        build=networks.digits_mlp,
        clients=[some(part[len(part) // 4 :]) for part in parts],
        own=[some(part[: len(part) // 4]) for part in parts],
        test=(grey(test[0][:2000]), classes(test[1][:2000])),
        rate=0.1,
    )


def divide(
    labels: np.ndarray, clients: int, size: int, alpha: float, draw: np.random.Generator
) -> list[np.ndarray]:
    """Return each client's places in the data, without repetition.

    Args:
        labels: class of each example.
        clients: their number.
        size: examples of each.
        alpha: of Dirichlet's distribution over a client's classes (Hsu et al. 2019).
        draw: the generator.
    """
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


@cache
def fashion_mnist(folder: Path) -> tuple[np.ndarray, ...]:
    """Return images, shape (N, 28, 28), and classes of Fashion-MNIST, for training and test."""
    with np.load(folder / "fashion_mnist.npz") as z:
        return z["x_train"], z["y_train"], z["x_test"], z["y_test"]


@cache
def cifar_part(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images, shape (N, 3, 32, 32), and classes of one of CIFAR-10's files.

    A file holds differences along both sides of an image, red and blue after green was subtracted.
    """
    with np.load(folder / f"cifar10_{name}.npz") as z:
        images, labels = z["d"], z["y"]
    for side in (3, 2):
        images = np.cumsum(images, axis=side, dtype=np.uint8)
    images[:, [0, 2]] += images[:, [1]]
    return images, labels


TASKS: dict[str, Callable[[Path, np.random.Generator], Task]] = {
    "fashion": fashion,
    "fashion, GroupNorm": partial(fashion, build=networks.normed_cnn),
    "fashion, Dirichlet 0.5": partial(fashion, alpha=0.5),
    "har": motion,
    "writers": writers,
    "two classes": two_classes,
    "cifar, pretrained": pretrained,
    "fashion, turned, alike": partial(turned, alpha=None),
    "fashion, turned, skewed": partial(turned, alpha=0.3),
}
