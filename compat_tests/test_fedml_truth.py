"""FedML's runs come to the weights of the file that Flower's runs are held against too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from torch import Tensor

from fedpara_plugins_fedml import FedMLRunner
from harness.fedml_project import arguments
from harness.truth import CASES, GAMMA, METHODS, TASK, check, loop, net


class Loader:
    """A client's batches, in the order that belongs to the round which the arguments name."""

    def __init__(self, client: int, args: Any) -> None:
        self.client, self.args = client, args

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return TASK.batches(self.client, self.args.round_idx + 1)


def federated(name: str, method: str) -> Mapping[str, Tensor]:
    keys: dict[str, Any] = {
        "client_num_in_total": TASK.clients,
        "client_num_per_round": TASK.clients,
        "comm_round": TASK.rounds,
        "learning_rate": TASK.lr,
        "round_idx": 0,
        "fedpara_mend": True,
        "fedpara_method": method,
        "fedpara_gamma": GAMMA,
    }
    args = arguments(**{**keys, **CASES[name].fedml})
    clients = range(TASK.clients)
    sizes = {client: TASK.size(client) for client in clients}
    train = {client: Loader(client, args) for client in clients}
    test = {client: [TASK.held_out(client)] for client in clients}
    data = [sum(sizes.values()), 400, [], [TASK.test_data()], sizes, train, test, 10]
    runner = FedMLRunner(args, torch.device("cpu"), data, net())
    runner.run()
    state: Mapping[str, Tensor] = runner.runner.server.state
    return state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_fedml_comes_to_the_truth(name: str, method: str) -> None:
    check(name, method, federated(name, method))


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_what_the_plain_loop_writes(name: str) -> None:
    check(name, "pfedpara", dict(loop(name, "pfedpara")) | {"private": net().fc2.bias.detach() * 0})
