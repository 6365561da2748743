"""Tests on the clients (FedML's key ``test_on_clients``) over a transport."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import fedpara_plugins as fedpara
from harness.fedml.deployment import FedMLDeployment, Net

PLUGIN = {"method": "pfedpara", "gamma": 0.3, "codec": "balanced"}
ROUNDS = 3

State = Mapping[str, Tensor]


def test_clients_test_the_servers_model_with_their_own_factors(tmp_path: Path) -> None:
    """After each aggregation, and before the next on what they have trained themselves."""
    train = {"comm_round": ROUNDS, "learning_rate": 0.1, "test_on_clients": "both"}
    with FedMLDeployment(tmp_path, "TRPC", plugin=PLUGIN, train=train) as engine:
        engine.finished()
    parts = fedpara.split(fedpara.convert(Net(), method="pfedpara", gamma=0.3))
    for number in range(1, ROUNDS + 1):
        for client in (0, 1):
            after = engine.noted(client, number, "after")
            check_same(engine.noted(client, number, "tested-after"), after, after)
            tested = engine.notes / f"{client}-{number}-tested-before.pt"
            assert tested.exists() == (number > 1)  # there is no aggregation before the first
            if number > 1:
                last = engine.noted(client, number - 1, "after")
                check_same(engine.noted(client, number, "tested-before"), last, parts.private)
    first, second = (engine.noted(client, ROUNDS, "tested-before") for client in (0, 1))
    check_same(first, second, parts.shared)
    assert not any(torch.equal(first[name], second[name]) for name in parts.private)


def check_same(found: State, expected: State, names: Iterable[str]) -> None:
    for name in names:
        assert torch.equal(found[name], expected[name]), name
