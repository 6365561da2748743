"""scikit-learn's digits over a few clients, as the eight entries that FedML calls a dataset."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10
HELD_OUT = 0.2


def load(clients: int, batch_size: int) -> list[Any]:
    """Numbers and loaders: all, held out, and each client's own; then the number of classes.

    Every client gets an equal share of shuffled images, and holds a fifth of it out.
    """
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16  # [n, 1, 8, 8]
    labels = torch.tensor(digits.target)[order]
    train, test = [], []
    for client in range(clients):
        mine = images[client::clients], labels[client::clients]
        held = int(HELD_OUT * len(mine[1]))
        test.append(TensorDataset(mine[0][:held], mine[1][:held]))
        train.append(TensorDataset(mine[0][held:], mine[1][held:]))

    def batches(parts: list[TensorDataset]) -> DataLoader[Any]:
        tensors = [torch.cat([part.tensors[i] for part in parts]) for i in (0, 1)]
        return DataLoader(TensorDataset(*tensors), batch_size=batch_size)

    return [
        sum(map(len, train)),
        sum(map(len, test)),
        batches(train),
        batches(test),
        {client: len(part) for client, part in enumerate(train)},
        {client: batches([part]) for client, part in enumerate(train)},
        {client: batches([part]) for client, part in enumerate(test)},
        CLASSES,
    ]
