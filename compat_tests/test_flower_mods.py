"""Flower mods around the plugin: after it they see ordinary arrays, before it they are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
)
from torch import nn

import fedpara_plugins as core
import fedpara_plugins_flower as fedpara
from harness.cells.flower import GAMMA
from harness.flower.apps import Apps, Experiment, Hooks, Outcome, federate, plugin_apps, train_app
from harness.oracles.task import TrainingTask

TASK = TrainingTask(clients=2, rounds=2, epochs=1)


def _section(method: str, codec: str) -> dict[str, Any]:
    return {"fedpara.method": method, "fedpara.codec": codec, "fedpara.gamma": GAMMA}


def _run(mods: list[Any], strategy: str, method: str, codec: str) -> Outcome:
    """Run an app with these mods in the list of its ClientApp."""
    experiment = Experiment(TASK, strategy, mods=())
    net = fedpara.factorised(TASK.net)
    apps = Apps(
        client=lambda: train_app(ClientApp(mods=mods), experiment, net),
        server=plugin_apps(experiment).server,
        clients=TASK.clients,
    )
    return federate(apps, _section(method, codec), raises=False)


def _changing(message: Message, context: Context, call_next: Any) -> Message:
    """Return a mod that adds a little to every array, whatever it is, as noise would."""
    reply: Message = call_next(message, context)
    if reply.has_content():
        for name, record in reply.content.array_records.items():
            noisy = {key: Array(np.asarray(a.numpy() + 0.25)) for key, a in record.items()}
            reply.content[name] = ArrayRecord(noisy)
    return reply


BEFORE = {
    "fixedclipping": (fixedclipping_mod, "dpclientfixed"),
    "adaptiveclipping": (adaptiveclipping_mod, "dpclientadaptive"),
    "localdp": (LocalDpMod(0.5, 0.01, 1.0, 0.1), "fedavg"),
    "noise": (_changing, "fedavg"),
}


@pytest.mark.in_turn
@pytest.mark.parametrize(("method", "codec"), [("fedpara", "none"), ("none", "lossless")])
@pytest.mark.parametrize("name", BEFORE)
def test_a_mod_that_changes_arrays_before_the_plugin_ends_the_run_in_its_first_round(
    name: str, method: str, codec: str
) -> None:
    mod, strategy = BEFORE[name]
    outcome = _run([mod, fedpara.client_mod], strategy, method, codec)
    assert isinstance(outcome.error, core.FedParaError)
    assert "fedpara.client_mod" in str(outcome.error)
    assert "before" in str(outcome.error)
    assert {(sent.round, sent.kind) for sent in outcome.sent} == {(1, "train")}


def test_a_mod_that_only_looks_may_stand_before_the_plugin() -> None:
    outcome = _run([arrays_size_mod, fedpara.client_mod], "fedavg", "fedpara", "lossless")
    assert outcome.error is None
    assert outcome.losses[-1] < outcome.losses[0]


def test_a_mod_after_the_plugin_sees_ordinary_arrays() -> None:
    seen: list[set[str]] = []

    def looking(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        seen.extend(set(record) for record in reply.content.array_records.values())
        return reply

    outcome = _run([fedpara.client_mod, looking], "fedavg", "pfedpara", "int8")
    assert outcome.error is None
    assert len(seen) == TASK.rounds * TASK.clients
    for names in seen:
        assert names == set(outcome.state)


def test_training_that_diverges_everywhere_at_once_says_so_and_nothing_else() -> None:
    def diverging(model: nn.Module, client: int, server_round: int) -> None:
        with torch.no_grad():
            model.get_parameter("fc2.weight")[3, 5] = float("nan")

    apps = plugin_apps(Experiment(TASK, hooks=Hooks(trained=diverging)))
    outcome = federate(apps, _section("fedpara", "none"), raises=False)
    assert isinstance(outcome.error, core.FedParaError)
    assert "'fc2.weight' holds 1 NaN" in str(outcome.error)
    assert "set the fedpara option clip = relative. If" in str(outcome.error)
    assert "mods" not in str(outcome.error)
    assert {(sent.round, sent.kind) for sent in outcome.sent} == {(1, "train")}
