"""The user's own part, in plain torch: models, data, training loop. No framework, no plugin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.functional import silu

__all__ = ["MODELS", "BatchNet", "Net", "TrainingTask", "evaluate", "train"]

SIZES = {
    1: (201,),
    2: (201, 210),
    3: (201, 210, 215),
    4: (201, 210, 215, 220),
    7: (121, 124, 127, 130, 133, 136, 140),
}
"""Training images of each client, by their number: unequal, so that a wrong weighting shows, in
equally many batches of 20, so that integer buffers stay integers when they are averaged. Two and
three are for runs on real engines; seven are the fewest that Bulyan can do with against one
malicious client."""
HELD_OUT = 40
TEST = 400
SKEW = 8.0
"""Standard deviation of the noise in the sort by label that deals images out; 0 is full skew."""


class Net(nn.Module):
    """A small CNN for 8x8 images, with GroupNorm; conv1 and fc2 are too small to be factorised.

    Its activation is smooth: at a kink one rounding decides a whole gradient step, and two correct
    runs would differ by more than rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = self._normalise(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.norm2 = self._normalise(32)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def _normalise(self, channels: int) -> nn.Module:
        return nn.GroupNorm(4, channels)

    def forward(self, images: Tensor) -> Tensor:
        x = silu(self.norm1(self.conv1(images)))  # [n, 16, 8, 8]
        x = silu(self.norm2(self.conv2(x)))  # [n, 32, 4, 4]
        x = silu(self.fc1(x.flatten(1)))  # [n, 64]
        logits: Tensor = self.fc2(x)  # [n, 10]
        return logits


class BatchNet(Net):
    """The same with BatchNorm: float and integer buffers in the state, some without dimensions."""

    def _normalise(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels)


MODELS: dict[str, type[Net]] = {"groupnorm": Net, "batchnorm": BatchNet}


@dataclass(frozen=True)
class TrainingTask:
    """One training problem, with everything that decides its outcome.

    Attributes:
        model: a name in `MODELS`.
        clients: one of `SIZES`.
        rounds: number of rounds.
        epochs: a client's epochs in a round.
        batch_size: images.
        lr: learning rate of the clients' SGD.
        seed: seed of the initial weights, the deal of the data and the order of training.
    """

    model: str = "groupnorm"
    clients: int = 4
    rounds: int = 3
    epochs: int = 2
    batch_size: int = 20
    lr: float = 0.05
    seed: int = 7

    @property
    def net(self) -> type[Net]:
        """Return the model's class."""
        return MODELS[self.model]

    def size(self, client: int) -> int:
        """Return the number of a client's training images: its weight in an average."""
        return SIZES[self.clients][client]

    def batches(self, client: int, server_round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a client's batches of one round, all epochs; the arguments determine the order."""
        images, labels = _images()
        own = _deal(self.seed, self.clients)[client][HELD_OUT:]
        rng = np.random.default_rng([self.seed, client, server_round])
        for _ in range(self.epochs):
            order = rng.permutation(own)
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                yield images[batch], labels[batch]

    def held_out(self, client: int) -> tuple[Tensor, Tensor]:
        """Return a client's images that it never trains on."""
        images, labels = _images()
        own = _deal(self.seed, self.clients)[client][:HELD_OUT]
        return images[own], labels[own]

    def test_data(self) -> tuple[Tensor, Tensor]:
        """Return the server's images, which no client has."""
        images, labels = _images()
        own = _order(self.seed)[:TEST]
        return images[own], labels[own]


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    lr: float,
    proximal_mu: float | None = None,
) -> float:
    """Train in place as a user would, and return the mean loss of all batches.

    Args:
        model: with the state that the server sent.
        batches: images [n, 1, 8, 8] and labels [n].
        lr: learning rate.
        proximal_mu: FedProx's mu/2 times the squared distance from the state sent; None leaves
            the term out.
    """
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.train()
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        if proximal_mu is not None:
            pairs = zip(model.parameters(), start, strict=True)
            distance = sum(((new - old) ** 2).sum() for new, old in pairs)
            loss = loss + proximal_mu / 2 * distance
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    model.eval()
    images, labels = data
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels).item()
    return loss, float((logits.argmax(1) == labels).float().mean())


@cache
def _images() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(digits.target, dtype=torch.int64)


@cache
def _order(seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(len(_images()[1]))


@cache
def _deal(seed: int, clients: int) -> list[NDArray[np.int64]]:
    """Deal each client its images with a label skew, the held-out ones first."""
    sizes = [size + HELD_OUT for size in SIZES[clients]]
    pool = _order(seed)[TEST : TEST + sum(sizes)]
    rng = np.random.default_rng([seed, clients])
    labels = _images()[1].numpy()[pool]
    ranked = pool[np.argsort(labels + rng.normal(0, SKEW, len(pool)), kind="stable")]
    ends = np.cumsum(sizes)[:-1]
    return [rng.permutation(own) for own in np.split(ranked, ends)]
