"""Secure aggregation: the legacy SecAgg+ workflow with a method, and its refusal of a codec."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.client.mod import secaggplus_mod
from flwr.common import bytes_to_ndarray
from flwr.server import LegacyContext, ServerConfig
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import ServerApp
from torch import Tensor, nn

import fedpara_plugins as core
import fedpara_plugins_flower as fedpara
from harness.cells.flower import GAMMA
from harness.flower.apps import Apps, Hooks, Outcome, federate
from harness.flower.legacy_apps import LegacyExperiment, components, legacy_client_app
from harness.oracles.plain_loop import RULES, PlainResult, run_plain_loop
from harness.oracles.task import TrainingTask

State = dict[str, Tensor]

TASK = TrainingTask(clients=3, rounds=2, epochs=1)
CLIPPING = 3.0
LEVELS = 2**20
"""Of the workflow's quantisation: one step is 6e-6, so that a run stays near the exact one."""


def _section(method: str, codec: str = "none", **options: Any) -> dict[str, Any]:
    chosen = {"method": method, "codec": codec, "gamma": GAMMA, **options}
    return {f"fedpara.{key.replace('_', '-')}": value for key, value in chosen.items()}


def _apps(experiment: LegacyExperiment, *, plugin: bool = True, mod_first: bool = False) -> Apps:
    """Return an app whose ServerApp runs the workflow, with the plugin's lines or without."""
    net = fedpara.factorised(experiment.task.net) if plugin else experiment.task.net
    mods = [secaggplus_mod]
    if plugin:
        mods.insert(0 if mod_first else 1, fedpara.client_mod)

    def server(outcome: Outcome) -> ServerApp:
        app = ServerApp()

        @app.main()
        def main(grid: Any, context: Any) -> None:
            made = components(experiment, net, outcome)(context)
            legacy = LegacyContext(
                context=context,
                config=ServerConfig(num_rounds=experiment.task.rounds),
                strategy=made.strategy,
            )
            workflow = SecAggPlusWorkflow(
                num_shares=3,
                reconstruction_threshold=2,
                max_weight=500,
                clipping_range=CLIPPING,
                quantization_range=LEVELS,
                modulus_range=2**30,
            )
            DefaultWorkflow(fit_workflow=workflow)(grid, legacy)

        return fedpara.server_app(app) if plugin else app

    return Apps(lambda: legacy_client_app(experiment, net, mods), server, TASK.clients)


def _run(experiment: LegacyExperiment, section: dict[str, Any], **options: Any) -> Outcome:
    apps = _apps(experiment, **options)
    return federate(apps, section, raises=False)


def _build(method: str) -> nn.Module:
    return core.convert(TASK.net(), method=method, gamma=GAMMA)


def _plain_loop(method: str) -> PlainResult:
    return run_plain_loop(
        TASK,
        partial(_build, method),
        RULES["fedavg"](),
        private_names=tuple(core.split(_build(method)).private),
    )


def _distance(a: State, b: State, keys: list[str]) -> float:
    return float(sum(((a[key].double() - b[key].double()) ** 2).sum() for key in keys) ** 0.5)


def _masked(outcome: Outcome) -> list[list[np.ndarray[Any, Any]]]:
    """Return the masked lists that clients sent, without the weight in front."""
    found = []
    for sent in outcome.sent:
        configs: Any = sent.content.config_records.get("secaggplus_configs", {})
        if sent.direction == "up" and "masked_params" in configs:
            found.append([bytes_to_ndarray(data) for data in configs["masked_params"]][1:])
    return found


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("method", ["none", "lowrank", "pfedpara", "fedpara"])
def test_a_masked_run_is_that_of_a_plain_loop(method: str) -> None:
    after: dict[tuple[int, int], State] = {}
    private = list(core.split(_build(method)).private)

    def trained(model: nn.Module, client: int, server_round: int) -> None:
        state = model.state_dict()
        after[client, server_round] = {key: state[key].clone() for key in private}

    outcome = _run(LegacyExperiment(TASK, hooks=Hooks(trained=trained)), _section(method))
    assert outcome.error is None
    plain = _plain_loop(method)
    shared = [key for key in plain.state if key not in private]
    moved, off = (_distance(plain.state, s, shared) for s in (plain.initial, outcome.state))
    assert off < 0.01 * moved
    for client, state in plain.private.items():
        for key, value in state.items():
            torch.testing.assert_close(after[client, TASK.rounds][key], value, rtol=0.01, atol=1e-4)


def test_masks_cover_the_shared_part_and_nothing_else() -> None:
    outcome = _run(LegacyExperiment(TASK), _section("pfedpara"))
    shared = core.split(_build("pfedpara")).shared
    lists = _masked(outcome)
    assert len(lists) == TASK.rounds * TASK.clients
    for arrays in lists:
        assert [a.shape for a in arrays] == [tuple(value.shape) for value in shared.values()]
    # Nothing else that goes up carries arrays, and the masked bytes are counted.
    for sent in outcome.sent:
        if sent.direction == "up":
            assert sent.array_bytes == 0
    assert any("round 1: up" in line and "up 0 B" not in line for line in outcome.log)


def test_what_is_masked_is_not_what_was_trained() -> None:
    """The control: masks are on."""
    after: dict[int, State] = {}

    def trained(model: nn.Module, client: int, server_round: int) -> None:
        if server_round == 1:
            after[client] = {k: v.clone() for k, v in core.split(model).shared.items()}

    outcome = _run(LegacyExperiment(TASK, hooks=Hooks(trained=trained)), _section("pfedpara"))
    quantised = [
        np.round((value.numpy() + CLIPPING) / (2 * CLIPPING) * LEVELS)
        for state in after.values()
        for key, value in state.items()
        if key == "conv1.weight"
    ]
    for arrays in _masked(outcome)[: TASK.clients]:
        for plain in quantised:
            assert not np.allclose(arrays[0], plain, rtol=0.01)


def test_with_everything_off_the_workflow_is_the_plain_apps() -> None:
    """Masks are drawn at random, so the messages' shapes are compared, not their bytes."""
    experiment = LegacyExperiment(TASK)
    plain, plugged = _run(experiment, {}, plugin=False), _run(experiment, _section("none"))
    assert plugged.error is None

    def shape(outcome: Outcome) -> list[tuple[Any, ...]]:
        return sorted((s.kind, s.direction, s.partition, list(s.content)) for s in outcome.sent)

    assert shape(plugged) == shape(plain)
    assert not [line for line in plugged.log if "dense: up 0.00" in line]
    assert plugged.losses == pytest.approx(plain.losses, rel=1e-3)


@pytest.mark.parametrize("method", ["none", "fedpara"])
@pytest.mark.parametrize("codec", [{"codec": "int8"}, {"uplink_codec": "small"}])
def test_a_codec_is_refused_with_the_reason(method: str, codec: dict[str, str]) -> None:
    outcome = _run(LegacyExperiment(TASK), _section(method, **codec))
    assert isinstance(outcome.error, core.ConfigError)
    for text in ("SecAgg+", "masks", "option codec to none"):
        assert text in str(outcome.error)
    assert not outcome.sent


def test_the_other_order_of_mods_is_refused_where_private_values_would_be_masked() -> None:
    outcome = _run(LegacyExperiment(TASK), _section("pfedpara"), mod_first=True)
    assert isinstance(outcome.error, core.FedParaError)
    assert "mods=[secaggplus_mod, fedpara.client_mod]" in str(outcome.error)
    assert not _masked(outcome)


def test_without_private_values_either_order_will_do() -> None:
    outcome = _run(LegacyExperiment(TASK), _section("fedpara"), mod_first=True)
    assert outcome.error is None
    assert outcome.losses == pytest.approx(_plain_loop("fedpara").losses, rel=2e-3)
