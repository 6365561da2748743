"""Flower's runs reach the golden weights, which FedML's runs reach too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.serverapp import strategy as flower
from torch import nn

import fedpara_plugins_flower as fedpara
from fedpara_plugins.optimizers import trained_parameters
from harness.flower.apps import federate
from harness.flower.drift_apps import DriftExperiment, drift_apps
from harness.oracles.golden_weights import CASES, METHODS, OPTIONS, TASK, TruthNet, check


def federated(name: str, method: str) -> Any:
    case = CASES[name]
    mu = case.keys.get("fedprox_mu", 0.0)

    def train(model: nn.Module, client: int, server_round: int) -> None:
        """Train as a user would; FedProx's term is about the shared part."""
        pulled = trained_parameters(model)
        start = {key: value.detach().clone() for key, value in pulled.items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=TASK.lr)
        model.train()
        for images, labels in TASK.batches(client, server_round):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            if mu:
                loss = loss + mu / 2 * sum(((w - start[k]) ** 2).sum() for k, w in pulled.items())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    kind = getattr(fedpara if case.flower == "Scaffold" else flower, case.flower)
    options = {"min_available_nodes": TASK.clients, **case.options}
    experiment = DriftExperiment(kind, options, TASK, train, factory=TruthNet)
    section = {"method": method, "codec": "none", **OPTIONS[method]}
    return federate(drift_apps(experiment), {f"fedpara.{k}": v for k, v in section.items()})


@pytest.mark.in_turn
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_flower_reaches_the_golden_weights(name: str, method: str) -> None:
    check(name, method, federated(name, method).state)
