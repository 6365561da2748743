"""One hostile client process of four, over each transport: it is left out, and nobody else is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedpara_plugins as fedpara
from fedpara_plugins import ModelSpec
from harness.fedml.deployment import FedMLDeployment, Net, digits
from harness.fedml.hostile_process import ATTACKS, lines_of
from harness.fedml.requirements import skip_without
from harness.oracles.fedml_rules import ALGORITHMS

RANK, CLIENTS = 2, 4
SILO = RANK - 1
LR = 0.01
PERSONAL: Mapping[str, Any] = {"method": "pfedpara", "gamma": 0.3}
TOLERANCE = 5e-5
AWAY = 1e-3
"""How far off the weights are at least if the hostile client had a part in them."""


@pytest.mark.parametrize("backend", ["TRPC", "MPI", "GRPC", "MQTT_S3"])
def test_a_hostile_process_is_left_out_of_each_round_and_named(
    tmp_path: Path, backend: str
) -> None:
    """An attack a round; the model is that of the three others alone, in plain torch."""
    skip_without(backend)
    plan = list(ATTACKS)
    raising = plan.index("a training that raises") + 1
    with FedMLDeployment(
        tmp_path,
        backend,
        clients=CLIENTS,
        plugin=PERSONAL,
        train={"comm_round": len(plan), "learning_rate": LR},
        trouble=f"client {RANK} round {raising} raises",
    ) as engine:
        engine.processes.env["FEDPARA_HOSTILE"] = json.dumps([RANK, plan])
        engine.run_to_the_end()
        log = engine.text("server")
    for number, name in enumerate(plan, 1):
        lines = lines_of(log, SILO, number)
        assert len(lines) == 1, (name, lines, engine.tail("server"))
        assert re.search(ATTACKS[name][1], lines[0]), (name, lines)
    assert len(re.findall("left out client", log)) == len(plan)
    wanted = without_the_hostile_one(len(plan))
    assert distance(engine.final, wanted) <= TOLERANCE
    assert distance(engine.final, with_all(len(plan))) > AWAY


@cache
def without_the_hostile_one(rounds: int) -> Mapping[str, Tensor]:
    return plain(rounds, [silo for silo in range(CLIENTS) if silo != SILO])


@cache
def with_all(rounds: int) -> Mapping[str, Tensor]:
    return plain(rounds, list(range(CLIENTS)))


def plain(rounds: int, silos: list[int]) -> Mapping[str, Tensor]:
    """Return the weights of FedAvg in plain torch on the data of some silos."""
    data = digits.load(CLIENTS, 32)[5]
    batches = {place: list(data[silo]) for place, silo in enumerate(silos)}
    torch.manual_seed(0)  # FedML's random_seed
    model = fedpara.convert(Net(), **PERSONAL)
    private = ModelSpec.of(model).initial_private()
    loop = ALGORITHMS["FedAvg"](model, batches, private=private, lr=LR)
    shared = loop.run(rounds, len(silos))
    # The server's private half is zero, so that its model is W1.
    model.load_state_dict({**shared, **{k: torch.zeros_like(v) for k, v in private.items()}})
    return fedpara.to_dense(model).state_dict()


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a weight."""
    assert found.keys() == wanted.keys()
    return max(float((found[k].double() - v.double()).abs().max()) for k, v in wanted.items())
