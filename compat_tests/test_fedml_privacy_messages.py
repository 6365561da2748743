"""Messages of a curious server to FedML's clients: nothing in them makes private values leave."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.core.alg_frame.client_trainer import ClientTrainer
from torch import Tensor

from fedpara_plugins import FedParaConfig, ModelSpec, convert, split
from fedpara_plugins.codecs import encode_payload, parse_codec, reference_hash
from fedpara_plugins_fedml import FedMLRunner
from fedpara_plugins_fedml.messages.envelope import pack, unpack
from fedpara_plugins_fedml.messages.head import Head
from harness.fedml.project import arguments, dataset, model
from harness.oracles.descriptions import decode_payload
from harness.processes.canaries import Canaries

State = dict[str, Tensor]

OPTIONS = {"gamma": 0.3, "min_size": 1}
CASES = {
    "pfedpara": {"method": "pfedpara"},
    "private head": {"method": "none", "private": "4.*"},
    "private head and factors": {"method": "fedpara", "private": "4.*", "exclude": "4"},
    "both": {"method": "pfedpara", "private": "2.bias"},
    "dense": {"method": "pfedpara", "local": "dense"},
}
EACH_CASE = pytest.mark.parametrize("name", CASES)


def _value(name: str, like: Tensor) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    return 0.05 * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def _planted(state: Mapping[str, Tensor]) -> State:
    return {name: _value(name, value) for name, value in state.items()}


class _Trainer(ClientTrainer):
    """Trains every tensor to a recognisable value."""

    ran = 0

    def get_model_params(self) -> Any:
        return OrderedDict(self.model.cpu().state_dict())

    def set_model_params(self, model_parameters: Any) -> None:
        self.model.load_state_dict(model_parameters)

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        type(self).ran += 1
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(_value(name, parameter))

    def test(self, test_data: Any, device: Any, args: Any) -> Any:
        return {"test_correct": 0, "test_loss": 0.0, "test_total": 1}


class _Client:
    """One client's engine, and its own model as computed here."""

    def __init__(self, name: str, optimizer: str = "FedAvg") -> None:
        self.options = {**OPTIONS, **CASES[name]}
        keys = {f"fedpara_{key}": value for key, value in self.options.items()}
        args = arguments(federated_optimizer=optimizer, fedpara_mend=True, **keys)
        self._data = dataset()
        net = model()
        runner = FedMLRunner(
            args, torch.device("cpu"), self._data, net, client_trainer=_Trainer(net, args)
        )
        self.engine = runner.runner.clients
        own = convert(model(), FedParaConfig.from_mapping(self.options))
        self.spec, self.state = ModelSpec.of(own), dict(own.state_dict())
        patterns = self.options.get("private", "").replace("*", "")
        self.private = {
            key
            for key in self.state
            if (self.options["method"] == "pfedpara" and key[-2:] in ("x2", "y2"))
            or (patterns and key.startswith(patterns))
        }
        self.shared = {k: v for k, v in self.state.items() if k not in self.private}
        self._held = {reference_hash(self.shared): self.shared}

    @property
    def secrets(self) -> Canaries:
        values = list(_planted({k: self.state[k] for k in self.private}).values())
        halves = [w for w, plan in self.spec.weights.items() if plan.private_names]
        dense = self.spec.dense_state(_planted(self.state))
        values += [dense[weight] for weight in halves]
        if self.options.get("local") == "dense":
            values += [_value(weight, dense[weight]) for weight in halves]
        return Canaries(values)

    def honest(self) -> bytes:
        return self.payload(self.spec.to_json(), self.shared)

    def payload(self, described: Any, tensors: Mapping[str, Tensor], **extra: Any) -> bytes:
        self._held[reference_hash(tensors)] = dict(tensors)
        codec = parse_codec("none")
        return encode_payload(dict(tensors), codec=codec, model=described, extra=extra)

    def send(self, payloads: Mapping[str, bytes], **head: Any) -> bytes:
        """Send a message to the first client, and assert that nothing private comes back."""
        message = pack(Head(**{"round": 1, **head}).to_json(), payloads)
        _, _, _, _, sizes, train, test, _ = self._data
        answer: bytes = self.engine.train("0", message, train[0], test[0], sizes[0])
        secrets = self.secrets
        assert len(secrets) > 40
        assert secrets.found_in(answer) == 0
        for payload in unpack(answer).payloads.values():
            tensors = decode_payload(payload, references=self._held, limit=10**8).tensors
            assert secrets.found_among(tensors) == []
            assert not tensors.keys() & self.private
        return answer


def _head(answer: bytes) -> Head:
    return Head.from_json(unpack(answer).head)


# Lies ---------------------------------------------------------------------------------------------


def _plain(client: _Client, state: Mapping[str, Tensor]) -> bytes:
    return client.payload(ModelSpec(weights={}, keys=tuple(state), seed=0).to_json(), state)


def _described(client: _Client, spec: ModelSpec) -> bytes:
    return client.payload(spec.to_json(), {key: client.state[key] for key in spec.shared_keys})


def _other(**options: Any) -> Callable[[_Client], bytes]:
    def lie(client: _Client) -> bytes:
        config = {**client.options, "private": "", "exclude": "", "local": "factors", **options}
        own = convert(model(), FedParaConfig.from_mapping(config))
        return client.payload(ModelSpec.of(own).to_json(), split(own).shared)

    return lie


def _one_less(client: _Client) -> bytes:
    """One private name is called shared."""
    last = max(client.private)
    spec = client.spec
    own = {key: value for key, value in spec.own.items() if key != last}
    weights = {w: p for w, p in spec.weights.items() if last not in spec.factor_keys(w).values()}
    return _described(client, replace(spec, own=own, weights=weights))


def _exchanged(client: _Client) -> bytes:
    """Names of private and shared factors change places."""
    pairs = {"x1": "x2", "x2": "x1", "y1": "y2", "y2": "y1"}
    keys = tuple(key[:-2] + pairs.get(key[-2:], key[-2:]) for key in client.spec.keys)
    return _described(client, replace(client.spec, keys=keys))


LIES: dict[str, Callable[[_Client], bytes]] = {
    "nothing private": lambda client: _plain(client, client.state),
    "shared alone": lambda client: _plain(client, client.shared),
    "dense": lambda client: _plain(client, model().state_dict()),
    "fedpara": _other(method="fedpara"),
    "lowrank": _other(method="lowrank"),
    "another rank": _other(method="pfedpara", gamma=0.7),
    "norm private": _other(method="pfedpara", private="0.bias"),
    "one private less": _one_less,
    "exchanged": _exchanged,
    "other order": lambda client: _described(
        client, replace(client.spec, keys=tuple(reversed(client.spec.keys)))
    ),
    "other seed": lambda client: _described(client, replace(client.spec, seed=7)),
    "wrapped": lambda client: _plain(client, {f"module.{k}": v for k, v in client.state.items()}),
    "no description": lambda client: client.payload(None, client.state),
}
TRUE = {("exchanged", "private head"), ("exchanged", "none")}
"""Where nothing changes places."""


@EACH_CASE
def test_the_search_finds_what_is_shared(name: str) -> None:
    client = _Client(name)
    answer = client.send({"model": client.honest()})
    assert _head(answer).error == ""
    shared = _planted(client.shared)
    if name == "dense":  # whose factors are computed from what it has trained
        shared = {key: value for key, value in shared.items() if key.endswith("bias")}
    control = Canaries(shared.values())
    assert control.found_in(answer) == len(control) > 40


@pytest.mark.in_turn
@pytest.mark.parametrize("lie", LIES)
@EACH_CASE
def test_a_lie_is_refused_before_anything_is_trained(name: str, lie: str) -> None:
    """As the first message, after an honest one, and beside an honest record."""
    client, before = _Client(name), _Trainer.ran
    record = LIES[lie](client)
    first = client.send({"model": record})
    if (lie, name) in TRUE:
        return
    assert _head(first).fatal or _head(first).error
    assert _Trainer.ran == before
    assert _head(client.send({"model": client.honest()})).error == ""
    assert _head(client.send({"model": record})).error
    assert _Trainer.ran == before + 1
    client.send({"model": client.honest(), "more": record})
    client.send({"more": record, "model": client.honest()})
    client.send({"more": client.honest()})


@pytest.mark.in_turn
@pytest.mark.parametrize("record", ["variate", "change", "gradient", "correction", "momentum"])
@pytest.mark.parametrize("optimizer", ["FedAvg", "FedProx", "SCAFFOLD", "FedDyn", "FedNova"])
@EACH_CASE
def test_records_and_tasks_of_optimizers(name: str, optimizer: str, record: str) -> None:
    if name == "dense" and optimizer in ("SCAFFOLD", "FedDyn"):
        return  # refused when the run begins
    client = _Client(name, optimizer)
    zeros = {key: torch.zeros_like(value) for key, value in client.state.items()}
    tasks: list[dict[str, Any]] = [
        {"accepted": 0, "correct": True, "bound": 0.0, "option": "II", "alpha": 1.0},
        {"accepted": 0, "correct": False, "bound": 1e9, "option": "I", "alpha": 1e-9},
        {},
    ]
    for task in tasks:
        for payloads in (
            {"model": client.honest()},
            {"model": client.honest(), record: client.payload(None, zeros)},
            {record: client.payload(None, client.state)},
        ):
            for purpose in ("train", "prepare", "evaluate"):
                client.send(payloads, task=task, purpose=purpose)


@EACH_CASE
def test_fields_that_no_client_knows(name: str) -> None:
    client = _Client(name)
    asked = {"private": [], "send": sorted(client.private), "private_keys": []}
    described = {**client.spec.to_json(), **asked, "private": client.spec.to_json()["private"]}
    client.send({"model": client.payload(described, client.shared, **asked)}, task=asked)
    client.send({}, task=asked)
    client.send({"model": client.honest()}, task=asked, report=asked, metrics=asked, lost=True)
