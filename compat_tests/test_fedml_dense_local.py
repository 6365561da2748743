"""Clients that train an ordinary dense model and send factors: ``fedpara_local: dense``."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS
from safetensors.torch import load_file
from torch import Tensor, nn

from fedpara_plugins import ConfigError, ModelSpec, convert, to_dense
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins_fedml.messages.envelope import unpack
from harness.fedml.project import Outcome, dataset, forget_security, model, run
from harness.oracles.dense_local import follow
from harness.oracles.descriptions import decode_payload
from harness.oracles.fedml_fedavg import FedAvgLoop

KEYS = {"fedpara_gamma": 0.5, "fedpara_local": "dense"}
CONVERTING = ("lowrank", "fedpara", "pfedpara")
EVERYBODY = {"client_num_per_round": 4}


@pytest.fixture(autouse=True)
def _security_forgotten() -> Iterator[None]:
    yield
    forget_security()


class DenseLoop(FedAvgLoop):
    """The loop whose clients train the plain model; factors follow at the end of their round."""

    def __init__(self, method: str, mu: float = 0.0, **options: Any) -> None:
        self.plain, self.mu = model(), mu
        net = convert(model(), method=method, gamma=0.5)
        private = ModelSpec.of(net).initial_private()
        super().__init__(net, dataset()[5], private=private, **options)

    def trained(self, client: int) -> dict[str, Tensor]:
        """Descend along the gradient of the composed weights by hand."""
        self.model.load_state_dict({**self.x, **self.own[client]})
        self.plain.load_state_dict(to_dense(self.model).state_dict(), strict=True)
        weights = list(self.plain.parameters())
        start = [weight.detach().clone() for weight in weights]
        for inputs, labels in self.train[client]:
            loss = nn.functional.cross_entropy(self.plain(inputs), labels)
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, gradient, origin in zip(weights, gradients, start, strict=True):
                    weight.sub_(self.lr * (gradient + self.mu * (weight - origin)))
        follow(self.model, self.plain)
        after = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.own[client] = {k: after[k] for k in self.own[client]}
        return after


def _check_near(state: dict[str, Tensor], loop: FedAvgLoop, tolerance: float = 1e-3) -> None:
    torch.manual_seed(0)
    first = loop.first
    moved = sum(float((loop.x[k] - first[k]).square().sum()) for k in loop.x) ** 0.5
    off = sum(float((loop.x[k] - state[k]).square().sum()) for k in loop.x) ** 0.5
    assert moved > 0.1
    assert off < tolerance * moved


def _looped(method: str, **options: Any) -> DenseLoop:
    loop = DenseLoop(method, lr=0.3, **options)
    loop.first = copy.deepcopy(loop.x)
    loop.run(3, 4)
    return loop


@pytest.mark.parametrize("method", CONVERTING)
def test_a_run_is_that_of_a_plain_loop(method: str) -> None:
    outcome = run(**KEYS, **EVERYBODY, fedpara_method=method, learning_rate=0.3)
    loop = _looped(method)
    _check_near(outcome.state, loop)
    for client, own in loop.own.items():
        for name, value in own.items():
            torch.testing.assert_close(outcome.kept(client)[name], value, rtol=1e-2, atol=1e-3)
    factors = run(**EVERYBODY, fedpara_gamma=0.5, fedpara_method=method, learning_rate=0.3)
    with pytest.raises(AssertionError):  # the control
        _check_near(factors.state, loop, 0.1)


def test_the_proximal_term_acts_on_dense_weights() -> None:
    keys = {"federated_optimizer": "FedProx", "fedprox_mu": 0.7, "fedpara_method": "fedpara"}
    outcome = run(**KEYS, **EVERYBODY, **keys, learning_rate=0.3)
    _check_near(outcome.state, _looped("fedpara", mu=0.7))
    with pytest.raises(AssertionError):
        _check_near(outcome.state, _looped("fedpara"))


@pytest.mark.in_turn(every=3)
@pytest.mark.parametrize("method", CONVERTING)
def test_messages_have_the_size_of_those_of_factor_training(method: str) -> None:
    def traffic(local: str, codec: str) -> list[tuple[Any, ...]]:
        outcome = run(
            **{**KEYS, "fedpara_local": local}, fedpara_method=method, fedpara_codec=codec
        )
        return [
            (s.direction, s.round, s.client, len(unpack(s.data).payloads["model"]))
            for s in outcome.sent
        ]

    assert traffic("dense", "none") == traffic("factors", "none")
    sizes = [sum(row[-1] for row in traffic(local, "balanced")) for local in ("dense", "factors")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


class Trainer(ModelTrainerCLS):
    """A trainer that knows dense layers alone, and looks at what it is given."""

    seen: ClassVar[list[tuple[str, list[str], bool]]] = []

    def _look(self, when: str, names: Any) -> None:
        factorised = any(isinstance(m, FactorisedLayer) for m in self.model.modules())
        Trainer.seen.append((when, list(names), factorised))

    def set_model_params(self, params: Any) -> None:
        self._look("set", params)
        super().set_model_params(params)

    def train(self, data: Any, device: Any, args: Any) -> None:
        self._look("train", self.model.state_dict())
        self.model[0].weight  # noqa: B018
        super().train(data, device, args)


def test_a_client_s_model_is_never_converted() -> None:
    Trainer.seen.clear()
    net = model()
    layers = [type(layer) for layer in net]
    outcome = run(**KEYS, fedpara_method="fedpara", client_trainer=Trainer, net=net)
    assert len(Trainer.seen) > 12
    assert {when for when, _, _ in Trainer.seen} == {"set", "train"}
    plain = list(model().state_dict())
    assert all(names == plain and not factorised for _, names, factorised in Trainer.seen)
    assert [type(layer) for layer in net] == layers
    assert "0.x1" in outcome.state
    for sent in outcome.sent:
        carried = decode_payload(unpack(sent.data).payloads["model"], limit=10**7).tensors
        assert set(carried) == set(outcome.state)


class Partial(Trainer):
    """It exchanges the first two layers; the last stays with each client."""

    def get_model_params(self) -> Any:
        return {k: v for k, v in self.model.cpu().state_dict().items() if not k.startswith("4.")}

    def set_model_params(self, params: Any) -> None:
        self.model.load_state_dict(params, strict=False)


class PartialServer(DefaultServerAggregator):
    """The same on the server, whose model has factors."""

    def get_model_params(self) -> Any:
        return {k: v for k, v in self.model.state_dict().items() if not k.startswith("4.")}

    def set_model_params(self, params: Any) -> None:
        self.model.load_state_dict(params, strict=False)


def test_a_project_that_exchanges_a_part_of_its_model() -> None:
    sides = {"client_trainer": Partial, "server_aggregator": PartialServer}
    outcome = run(**KEYS, **sides, fedpara_method="fedpara", net=model(), comm_round=2)
    last = decode_payload(unpack(outcome.sent[-1].data).payloads["model"], limit=10**7).tensors
    whole = ModelSpec.of(convert(model(), method="fedpara", gamma=0.5)).keys
    assert set(last) == {name for name in whole if not name.startswith("4.")}


def test_it_learns(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for method in ("fedpara", "pfedpara"):
        caplog.clear()
        run(**KEYS, **EVERYBODY, fedpara_method=method, fedpara_codec="balanced", comm_round=8)
        found = [
            r.msg["test_acc"]
            for r in caplog.records
            if isinstance(r.msg, dict) and "test_acc" in r.msg
        ]
        assert found[-1] > 0.8


def test_checkpoints_are_dense_models(tmp_path: Path) -> None:
    outcome = run(
        **KEYS, **EVERYBODY, fedpara_method="pfedpara",
        fedpara_checkpoint=str(tmp_path / "server.safetensors"),
        fedpara_client_checkpoints=str(tmp_path),
    )  # fmt: skip
    for name in ("server", "client-0", "client-3"):
        model().load_state_dict(load_file(tmp_path / f"{name}.safetensors"), strict=True)
    spec = outcome.runner.runner.server.spec
    own = load_file(tmp_path / "client-3.safetensors")
    for name, value in spec.dense_state(outcome.kept(3)).items():
        torch.testing.assert_close(own[name], value)
    assert not torch.equal(own["0.weight"], load_file(tmp_path / "server.safetensors")["0.weight"])


def test_a_client_whose_training_gives_nan_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Bad(ModelTrainerCLS):
        def train(self, data: Any, device: Any, args: Any) -> None:
            super().train(data, device, args)
            if self.id == 1:
                with torch.no_grad():
                    self.model[2].weight[0, 0] = float("inf")

    outcome = run(**KEYS, **EVERYBODY, fedpara_method="fedpara", client_trainer=Bad)
    text = "\n".join(r.getMessage() for r in caplog.records)
    assert "left out client 1 in round 1" in text
    assert "'2.weight' holds 1 NaN or infinite" in text
    assert all(torch.isfinite(value).all() for value in outcome.state.values())


@pytest.mark.parametrize("optimizer", ["SCAFFOLD", "FedDyn", "Mime"])
def test_what_corrects_gradients_by_sums_over_factors_is_refused(optimizer: str) -> None:
    with pytest.raises(ConfigError, match=f"{optimizer} does not go with local='dense'"):
        run(**KEYS, fedpara_method="fedpara", federated_optimizer=optimizer)


@pytest.mark.parametrize("optimizer", ["FedOpt", "FedNova"])
def test_optimizers_of_the_server_learn(optimizer: str) -> None:
    keys = {"server_optimizer": "sgd", "server_lr": 1.0, "server_momentum": 0.0}
    outcome = run(
        **KEYS, **EVERYBODY, **keys, fedpara_method="fedpara", federated_optimizer=optimizer,
        learning_rate=0.3,
    )  # fmt: skip
    # FedOpt with plain SGD at rate 1 is FedAvg; FedNova with other step counts per client is not.
    loop = _looped("fedpara")
    _check_near(outcome.state, loop, 1e-3 if optimizer == "FedOpt" else 1.0)


@pytest.mark.parametrize("kind", ["ldp", "nbafl", "dp_clip"])
def test_privacy_promised_by_the_clients_is_refused(kind: str) -> None:
    keys = {"enable_dp": True, "dp_solution_type": kind, "delta": 1e-5, "epsilon": 1.0}
    with pytest.raises(ConfigError, match="fedpara_local: factors"):
        run(**KEYS, fedpara_method="fedpara", **keys)


def test_one_kind_of_round_goes_on_where_the_other_ended(tmp_path: Path) -> None:
    """What server and clients keep is the same whichever the clients train."""

    def once(local: str, rounds: int) -> Outcome:
        keys = {**KEYS, "fedpara_local": local, "fedpara_state_dir": str(tmp_path)}
        keys |= {"learning_rate": 0.3, "comm_round": rounds}
        return run(**keys, **EVERYBODY, fedpara_method="pfedpara")

    once("factors", 1)
    outcome = once("dense", 2)
    net = convert(model(), method="pfedpara", gamma=0.5)
    private = ModelSpec.of(net).initial_private()
    factors = FedAvgLoop(net, dataset()[5], private=private, lr=0.3)
    factors.run(1, 4)
    dense = DenseLoop("pfedpara", lr=0.3)
    dense.first, dense.x, dense.own = copy.deepcopy(dense.x), factors.x, factors.own
    dense.round([0, 1, 2, 3])
    _check_near(outcome.state, dense)
    for name, value in dense.own[2].items():
        torch.testing.assert_close(outcome.kept(2)[name], value, rtol=1e-2, atol=1e-3)
