"""SCAFFOLD's option I on FedML: whose loss it takes, and the same in all modes.

That it equals the published algorithm is a case of test_fedml_optimizers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.core import ClientTrainer
from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS
from torch import nn

from fedpara_plugins import ConfigError
from harness.fedml.optimizer_cases import (
    CASES,
    METHODS,
    assert_same,
    published_loop,
    run_case,
    with_keys,
)
from harness.fedml.project import model
from harness.fedml.project import run as run_single
from harness.fedml.threads import Parties

SHORT = {"comm_round": 3, "epochs": 1}
ONE = CASES["scaffold-one"]
SMOOTHING = 0.1


class Smooth(ClientTrainer):  # type: ignore[misc]
    """A user's trainer with a loss of its own."""

    def get_model_params(self) -> Any:
        return self.model.state_dict()

    def set_model_params(self, model_parameters: Any) -> None:
        self.model.load_state_dict(model_parameters)

    def loss(self, inputs: Any, labels: Any) -> torch.Tensor:
        outputs = self.model(inputs)
        return nn.functional.cross_entropy(outputs, labels, label_smoothing=SMOOTHING)

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=args.learning_rate)
        for _ in range(args.epochs):
            for inputs, labels in train_data:
                optimizer.zero_grad()
                self.loss(inputs, labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def test(self, test_data: Any, device: Any, args: Any) -> Any:
        return {"test_correct": 1, "test_loss": 1.0, "test_total": 1}


class Tells(Smooth):
    """Its loss can be asked for."""

    def losses(self, train_data: Any, device: Any, args: Any) -> Iterator[tuple[torch.Tensor, int]]:
        for inputs, labels in train_data:
            yield self.loss(inputs, labels), len(labels)


class Quiet(ModelTrainerCLS):  # type: ignore[misc]
    """FedML's training, another test."""

    def test(self, test_data: Any, device: Any, args: Any) -> Any:
        return {"test_correct": 1, "test_loss": 1.0, "test_total": 1}


class Kept(DefaultServerAggregator):  # type: ignore[misc]
    """Remembers the last model."""

    last: dict[str, torch.Tensor]

    def set_model_params(self, model_parameters: Any) -> None:
        super().set_model_params(model_parameters)
        Kept.last = {name: value.clone() for name, value in model_parameters.items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_trainers_own_loss(method: str) -> None:
    found = run_case(ONE, method, model(), client_trainer=Tells, **SHORT)
    wanted = published_loop(ONE, method, model(), epochs=1, smoothing=SMOOTHING)
    assert_same(found.state, wanted.run(3, 2))


def test_a_trainer_whose_training_is_fedmls_needs_to_say_nothing() -> None:
    found = run_case(ONE, "none", model(), client_trainer=Quiet, **SHORT)
    assert_same(found.state, published_loop(ONE, "none", model(), epochs=1).run(3, 2))


def test_a_trainer_whose_loss_is_not_known_ends_the_run_with_what_to_write() -> None:
    known = r"the loss of Smooth is not known.*losses\(self, train_d"
    with pytest.raises(ConfigError, match=known):
        run_case(ONE, "none", model(), client_trainer=Smooth, **SHORT)
    two = run_case(CASES["scaffold"], "none", model(), client_trainer=Smooth, **SHORT)
    wanted = published_loop(CASES["scaffold"], "none", model(), epochs=1, smoothing=SMOOTHING)
    assert_same(two.state, wanted.run(3, 2))


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="'fedpara_scaffold_option': expected 'I' or 'II', got"):
        run_case(with_keys("scaffold", fedpara_scaffold_option="III"), "none", model(), **SHORT)


@pytest.mark.parametrize("of_clients", ["I", "II"])
def test_cross_silo_gives_the_weights_of_the_single_process(
    monkeypatch: pytest.MonkeyPatch, of_clients: str
) -> None:
    """The server's option counts, whatever the clients' YAML says."""
    keys = {"federated_optimizer": "SCAFFOLD", "fedpara_method": "pfedpara", "fedpara_gamma": 0.3}
    keys |= {"fedpara_init": "seeded", "server_lr": 1.0, **ONE.keys}
    other = {**keys, "fedpara_scaffold_option": of_clients}
    of_rank = {1: other, 2: other}
    parties = Parties(monkeypatch, keys=keys, of_rank=of_rank, aggregator=Kept).run()
    assert not parties.errors
    whole = {"client_num_in_total": 2, "client_num_per_round": 2, "comm_round": 3}
    single = run_single(**whole, **keys)
    for name, value in single.state.items():
        torch.testing.assert_close(Kept.last[name], value)
    two = run_single(**whole, **{**keys, "fedpara_scaffold_option": "II"})
    assert max(float((two.state[k] - v).abs().max()) for k, v in single.state.items()) > 1e-4
