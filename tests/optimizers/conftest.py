"""A small federation: four clients with their own data, a model with norms, any method."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara

CLIENTS = 4
LR = 0.1


@dataclass(frozen=True)
class Federation:
    """Data are fixed by the seed; ``build`` makes the same model each time."""

    method: str

    def build(self) -> nn.Module:
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(12, 40), nn.BatchNorm1d(40), nn.SiLU(), nn.Linear(40, 40), nn.Linear(40, 3)
        )
        if self.method == "none":
            return model
        return fedpara.convert(model, method=self.method, gamma=0.3, min_size=256, clip=None)

    def batches(self, client: int, server_round: int, steps: int = 5):
        generator = torch.Generator().manual_seed(1000 * client + server_round)
        weight = torch.randn(12, 3, generator=torch.Generator().manual_seed(client))
        for _ in range(steps):
            x = torch.randn(16, 12, generator=generator)
            yield x, (x @ weight).argmax(1)

    def loss(self, model: nn.Module, batch) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def private(self) -> frozenset[str]:
        return fedpara.ModelSpec.of(self.build()).private_keys


@pytest.fixture(params=["none", "fedpara", "pfedpara"])
def federation(request) -> Federation:
    return Federation(request.param)


PARTICIPANTS = [[0, 1], [2, 0], [3, 1], [0, 3], [2, 1], [0, 1, 2, 3]]
