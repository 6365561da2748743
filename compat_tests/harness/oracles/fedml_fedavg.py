"""Federated averaging written out in plain torch, without FedML and without the plugin."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["FedAvgLoop"]

Batches = Sequence[tuple[Tensor, Tensor]]


class FedAvgLoop:
    """FedAvg over clients that may keep a part of the model to themselves.

    Args:
        model: converted or not; with the first weights.
        train: each client's batches.
        private: names that never leave a client, with the values that each of them begins with.
        lr: learning rate of the clients' SGD.
        epochs: a client's epochs in a round.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Mapping[int, Batches],
        *,
        private: Mapping[str, Tensor] | None = None,
        lr: float = 0.1,
        epochs: int = 1,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.train = train
        self.lr, self.epochs = lr, epochs
        first = dict(private or {})
        self.x = {k: v.clone() for k, v in model.state_dict().items() if k not in first}
        self.own = {client: {k: v.clone() for k, v in first.items()} for client in train}

    def sample(self, number: int, a_round: int) -> list[int]:
        """Draw the clients of a round (the first is 0) as FedML does."""
        if a_round == len(self.train):
            return list(range(a_round))
        np.random.seed(number)
        return [int(c) for c in np.random.choice(len(self.train), a_round, replace=False)]

    def run(self, rounds: int, a_round: int) -> dict[str, Tensor]:
        """Run all rounds, and return the shared state at the end."""
        for number in range(rounds):
            self.round(self.sample(number, a_round))
        return self.x

    def round(self, clients: Sequence[int]) -> None:
        """Run one round."""
        total = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in self.x.items()}
        count = 0
        for client in clients:
            after = self.trained(client)
            size = sum(len(y) for _, y in self.train[client])
            for name in total:
                total[name] += size * after[name].double()
            count += size
        self.x = {
            k: (v / count if self.x[k].is_floating_point() else (v / count).round()).to(
                self.x[k].dtype
            )
            for k, v in total.items()
        }

    def trained(self, client: int) -> dict[str, Tensor]:
        """Return a client's state after its training; the private part stays with it."""
        self.model.load_state_dict({**self.x, **self.own[client]})
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.lr)
        for _ in range(self.epochs):
            for inputs, labels in self.train[client]:
                optimizer.zero_grad()
                loss: Any = nn.functional.cross_entropy(self.model(inputs), labels)
                loss.backward()
                optimizer.step()
        after = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.own[client] = {k: after[k] for k in self.own[client]}
        return after

    def accuracy(self, client: int, data: Batches) -> float:
        """Return the accuracy of the shared model, completed with a client's own part."""
        self.model.load_state_dict({**self.x, **self.own[client]})
        self.model.eval()
        with torch.no_grad():
            right = sum(int((self.model(x).argmax(-1) == y).sum()) for x, y in data)
        return right / sum(len(y) for _, y in data)
