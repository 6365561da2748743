"""SCAFFOLD and FedDyn where a part of the model stays with the client, against plain loops.

FedPer and FedBN (``fedpara_private``), pFedPara's decoupled schedule with a private head, coarse
codecs, and projects whose trainer exchanges a part of the state.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS
from torch import nn

from fedpara_plugins import ConversionError, ModelSpec, convert
from fedpara_plugins.training.step_hooks import round_progress, start_round
from harness.fedml.optimizer_cases import (
    CASES,
    CLIENTS,
    GAMMA,
    METHODS,
    assert_same,
    batch_model,
    published_loop,
    run_case,
    with_keys,
)
from harness.fedml.project import dataset, model
from harness.oracles.fedml_rules import PlainLoop

SHORT = {"comm_round": 4, "epochs": 1}
DRIFT = ("scaffold", "scaffold-one", "feddyn")
FEDPER, FEDBN = ("4.*", model), ("1.*", batch_model)


def assert_kept(outcome: Any, wanted: PlainLoop) -> None:
    """Assert that each client's own part is the loop's, or the first one if it never trained."""
    for client in range(CLIENTS):
        found = outcome.kept(client)
        assert_same({k: found[k] for k in wanted.own[client]}, wanted.own[client], 5e-6)


@pytest.mark.in_turn
@pytest.mark.parametrize(("private", "net"), [FEDPER, FEDBN], ids=["fedper", "fedbn"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DRIFT)
def test_names_that_stay_on_the_client(name: str, method: str, private: str, net: Any) -> None:
    wanted = published_loop(CASES[name], method, net(), epochs=1, options={"private": (private,)})
    state = wanted.run(4, 2)
    outcome = run_case(CASES[name], method, net(), fedpara_private=private, **SHORT)
    assert_same({k: outcome.state[k] for k in state}, state, 5e-6)
    assert_kept(outcome, wanted)
    assert [k for k in wanted.own[0] if k.startswith(private[:2])]
    assert not torch.equal(*(next(iter(wanted.own[c].values())).float() for c in (0, 1)))
    rule = outcome.runner.runner.server.rule
    assert rule.sums.total.keys() == set(wanted.names)


@pytest.mark.parametrize("name", DRIFT)
def test_a_private_head_and_the_decoupled_schedule(name: str) -> None:
    """Two private steps, then shared ones; the variate counts the shared ones alone."""
    options = {
        "private_head": True,
        "label_prior": True,
        "schedule": "decoupled",
        "private_steps": 2,
        "first_private_steps": 2,
    }
    net = convert(model(), method="pfedpara", gamma=GAMMA, **options)
    halves = {k for k in ModelSpec.of(net).initial_private() if k != "4.label_prior"}
    assert {"4.correction", "0.x2"} <= halves
    more: dict[str, Any] = {
        "options": options,
        "private_steps": 2,
        "halves": halves,
        "absent": halves,
    }
    wanted = published_loop(CASES[name], "pfedpara", model(), 2, **more)
    training = round_progress(wanted.model)
    assert training is not None
    training.decoupled = False  # the loop itself decides what a step moves
    start_round(wanted.model)
    chosen = {c for number in range(4) for c in wanted.sample(number, 2)}
    for client, batches in dataset(CLIENTS)[5].items():
        labels = [int(y) for _, part in batches for y in part]
        prior = [math.log((labels.count(k) + 0.1) / (len(labels) + 1)) for k in range(4)]
        if client in chosen:
            wanted.own[client]["4.label_prior"] = torch.tensor(prior)
    state = wanted.run(4, 2)
    keys = {f"fedpara_{key}": value for key, value in options.items()}
    outcome = run_case(CASES[name], "pfedpara", model(), comm_round=4, epochs=2, **keys)
    assert_same({k: outcome.state[k] for k in state}, state, 5e-6)
    assert_kept(outcome, wanted)
    assert float(wanted.own[min(chosen)]["4.correction"].abs().max()) > 1e-3


@pytest.mark.in_turn
@pytest.mark.parametrize("codec", ["lossless", "balanced", "small"])
@pytest.mark.parametrize("name", DRIFT)
def test_codecs_with_names_that_stay(name: str, codec: str) -> None:
    keys = {**SHORT, "comm_round": 6, "fedpara_private": "4.*"}
    exact, coded = (
        run_case(with_keys(name, fedpara_codec=text), "pfedpara", model(), **keys)
        for text in ("none", codec)
    )
    start = convert(model(), method="pfedpara", gamma=GAMMA).state_dict()
    names = outcome_names(coded)

    def distance(a: Any, b: Any) -> float:
        return float(sum(((a[k] - b[k]) ** 2).sum() for k in names) ** 0.5)

    share = {"lossless": 0.0, "balanced": 0.06, "small": 0.35}[codec]
    assert distance(coded.state, exact.state) <= share * distance(exact.state, start)
    assert codec == "lossless" or distance(coded.state, exact.state) > 0


def outcome_names(outcome: Any) -> list[str]:
    spec = outcome.runner.runner.server.spec
    return [name for name in outcome.state if name not in spec.private_keys]


def _without_first_layer(state: Any) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((k, v) for k, v in state.items() if not k.startswith("0."))


class _Part:
    """The first layer never travels."""

    model: nn.Module

    def get_model_params(self) -> Any:
        return _without_first_layer(self.model.state_dict())

    def set_model_params(self, params: Any) -> None:
        self.model.load_state_dict(params, strict=False)


class SendsAPart(_Part, ModelTrainerCLS):  # type: ignore[misc]
    """It is trained all the same, by whoever trains next."""


class AveragesAPart(_Part, DefaultServerAggregator):  # type: ignore[misc]
    pass


class Passing:
    """A loop whose clients train the first layer one after the other, as one process does."""

    passed: dict[str, torch.Tensor] | None = None

    def load(self, client: int) -> None:
        super().load(client)  # type: ignore[misc]
        if self.passed is not None:
            self.model.load_state_dict(self.passed, strict=False)  # type: ignore[attr-defined]

    def local(self, client: int) -> Any:
        found = super().local(client)  # type: ignore[misc]
        self.passed = {k: v for k, v in found.state.items() if k.startswith("0.")}
        return found


@pytest.mark.in_turn
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("method", ["none", "pfedpara"])
@pytest.mark.parametrize("name", [*DRIFT, "fedprox", "fednova-proximal"])
def test_a_project_that_exchanges_a_part_of_its_model(name: str, method: str, frozen: bool) -> None:
    def net() -> nn.Module:
        found = model()
        found[0].requires_grad_(not frozen)
        return found

    wanted: Any = published_loop(CASES[name], method, net(), epochs=1)
    wanted.__class__ = type("Passing", (Passing, type(wanted)), {})
    wanted.names = [k for k in wanted.names if not k.startswith("0.")]
    wanted.begin()
    state = _without_first_layer(wanted.run(4, 2))
    parts = {"client_trainer": SendsAPart, "server_aggregator": AveragesAPart}
    outcome = run_case(CASES[name], method, net(), **parts, **SHORT)
    names = [k for k in state if k in outcome_names(outcome)]
    assert names
    assert not [k for k in outcome.state if k.startswith("0.")]
    assert_same({k: outcome.state[k] for k in names}, {k: state[k] for k in names}, 5e-6)


class SendsOneFactor(ModelTrainerCLS):  # type: ignore[misc]
    def get_model_params(self) -> Any:
        return OrderedDict((k, v) for k, v in self.model.state_dict().items() if k != "0.x1")


def test_a_part_of_a_weights_factors_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"gives '0.x2' and not '0.x1', both factors of '0.w"):
        run_case(CASES["fedavg"], "pfedpara", model(), client_trainer=SendsOneFactor, **SHORT)
