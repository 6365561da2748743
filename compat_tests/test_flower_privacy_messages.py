"""Messages of a curious server: no description in them makes a client send private values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from torch import Tensor

import fedpara_plugins as core
import fedpara_plugins_flower as fedpara
from fedpara_plugins.models import ModelSpec
from harness.flower.hostile_server import (
    Device,
    Net,
    Reply,
    described,
    planted,
    private_names,
)
from harness.processes.canaries import Canaries

OPTIONS = {"fedpara.gamma": 0.3, "fedpara.min-size": 1}
TYPED = ("MismatchError", "ConfigError", "PayloadError", "fedpara:")


class Case:
    """A client's options, its model, and what is private by them.

    Args:
        method: its own.
        patterns: of the option ``private``.
        factorised: whether its code has that line.
        options: further ones.
    """

    def __init__(
        self, method: str, patterns: str = "", *, factorised: bool = True, **options: Any
    ) -> None:
        self.factorised = factorised
        self.patterns = patterns.split(",") if patterns else []
        section = {"method": method, "private": patterns, **options}
        self.section = {**OPTIONS, **{f"fedpara.{k}": v for k, v in section.items()}}
        self.config = core.FedParaConfig.from_mapping(
            {k.removeprefix("fedpara."): v for k, v in self.section.items()}
        )
        self.model = core.convert(Net(), self.config)
        self.spec = ModelSpec.of(self.model)
        self.state = dict(self.model.state_dict())
        self.dense_local = options.get("local") == "dense"
        self.private = private_names(list(self.state), method=method, patterns=self.patterns)
        self.shared = {k: v for k, v in self.state.items() if k not in self.private}

    def device(self, **changes: Any) -> Device:
        net = fedpara.factorised(lambda: Net()) if self.factorised else Net
        given = {"mods": [fedpara.client_mod], "run_config": self.section, **changes}
        return Device(net, **given)

    def honest(self) -> Any:
        return described(self.spec.to_json(), self.shared)

    @cached_property
    def secrets(self) -> Canaries:
        """What the client has trained: private tensors, and weights that they are part of."""
        values = planted({k: self.state[k] for k in self.private})
        composed = []
        if any(p.private_names for p in self.spec.weights.values()):
            dense = self.spec.dense_state(planted(self.state))
            composed = [dense[weight] for weight in self.spec.weights]
            if self.dense_local:
                composed += planted({k: dense[k] for k in self.spec.weights}).values()
        return Canaries([*values.values(), *composed])


PFEDPARA = Case("pfedpara")
CASES = {
    "pfedpara": PFEDPARA,
    "private head": Case("none", "head.*"),
    "private head, plain": Case("none", "head.*", factorised=False),
    "private norm and factors": Case("fedpara", "norm.*"),
    "all": Case("pfedpara", "norm.*,head.bias"),
    "dense": Case("pfedpara", local="dense"),
    "dense, plain": Case("pfedpara", local="dense", factorised=False),
}
KINDS = ["train", "evaluate", "query", "train.special", "query.special"]


# Lies ---------------------------------------------------------------------------------------------


def _lie(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> Any:
    """A description that fits itself, of these tensors."""
    return described(spec.to_json(), tensors)


def _nothing_private(case: Case) -> Any:
    return _lie(ModelSpec(weights={}, keys=tuple(case.state), seed=0), case.state)


def _shared_alone(case: Case) -> Any:
    return _lie(ModelSpec(weights={}, keys=tuple(case.shared), seed=0), case.shared)


def _dense(case: Case) -> Any:
    state = Net().state_dict()
    return _lie(ModelSpec(weights={}, keys=tuple(state), seed=0), state)


def _other(method: str, **options: Any) -> Callable[[Case], Any]:
    def lie(case: Case) -> Any:
        values = {**case.config.__dict__, "method": method, "private": (), "local": "factors"}
        model = core.convert(Net(), core.FedParaConfig(**{**values, **options}))
        return _lie(ModelSpec.of(model), core.split(model).shared)

    return lie


def _one_layer(case: Case) -> Any:
    """One layer is what the client expects, and the rest is plain."""
    model = core.convert(
        Net(), method="pfedpara", gamma=0.3, min_size=1, overrides={"head": {"method": "none"}}
    )
    return _lie(ModelSpec.of(model), core.split(model).shared)


def _renamed(case: Case) -> Any:
    """The private names are described, and shared tensors come under others that end alike."""
    state = {**case.shared, **{f"_orig_mod.{k}": case.state[k] for k in case.private}}
    keys = tuple(case.state) + tuple(f"_orig_mod.{k}" for k in case.private)
    return _lie(ModelSpec(case.spec.weights, keys, 0, case.spec.own), state)


def _one_private_less(case: Case) -> Any:
    """All private names but the last: one of them is described as shared."""
    last = sorted(case.private)[-1]
    own = {k: v for k, v in case.spec.own.items() if k != last}
    weights = case.spec.weights
    if last in case.spec.private_factors:
        weights = {
            w: p for w, p in weights.items() if last not in case.spec.factor_keys(w).values()
        }
    spec = ModelSpec(weights, case.spec.keys, case.spec.seed, own)
    return _lie(spec, {k: case.state[k] for k in spec.shared_keys})


def _another_model(case: Case) -> Any:
    """Private tensors of the client stand in a second, larger model."""
    state = {**case.state, "more.weight": torch.zeros(3, 3)}
    return _lie(ModelSpec(weights={}, keys=tuple(state), seed=0), state)


def _other_seed(case: Case) -> Any:
    return _lie(ModelSpec(case.spec.weights, case.spec.keys, 77, case.spec.own), case.shared)


def _swapped(case: Case) -> Any:
    """The names in another order."""
    keys = tuple(reversed(case.spec.keys))
    spec = ModelSpec(case.spec.weights, keys, case.spec.seed, case.spec.own)
    return _lie(spec, {k: case.state[k] for k in spec.shared_keys})


def _no_description(case: Case) -> Any:
    return described(None, case.state)


def _with_fields(case: Case) -> Any:
    model = {**case.spec.to_json(), "private_keys": [], "shared": sorted(case.private)}
    extra = {"private": [], "send": sorted(case.private), "codecs": ["none", "none"]}
    return described(model, case.shared, extra=extra)


LIES: dict[str, Callable[[Case], Any]] = {
    "nothing private": _nothing_private,
    "shared alone": _shared_alone,
    "dense": _dense,
    "fedpara": _other("fedpara"),
    "lowrank": _other("lowrank"),
    "pfedpara": _other("pfedpara"),
    "pfedpara of another rank": _other("pfedpara", gamma=0.6),
    "pfedpara, tanh": _other("pfedpara", tanh=True),
    "pfedpara, norm private": _other("pfedpara", private=("norm.*",)),
    "one layer": _one_layer,
    "renamed": _renamed,
    "one private less": _one_private_less,
    "another model": _another_model,
    "other seed": _other_seed,
    "other order": _swapped,
    "no description": _no_description,
    "further fields": _with_fields,
}
HARMLESS = {"further fields"}
"""What is described there is the client's own model."""


def check(replies: list[Reply], case: Case) -> None:
    """Assert that nothing private has left."""
    secrets = case.secrets
    assert len(secrets) > 50
    for reply in replies:
        assert secrets.found_in(reply.data) == 0
        for tensors in reply.tensors.values():
            assert secrets.found_among(tensors) == []
            assert not {name.removeprefix("_orig_mod.") for name in tensors} & case.private


def check_refused(reply: Reply) -> None:
    """Assert a typed error before the user's code ran."""
    assert any(word in reply.error for word in TYPED), reply.error or sorted(reply.content)
    assert not reply.ran


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_search_finds_what_is_shared_and_what_leaks(case: Case) -> None:
    """The control of all tests below: the same search, in the same traffic."""
    reply = case.device().send({"arrays": case.honest()})
    assert reply.error == ""
    check([reply], case)
    shared = {k: v for k, v in planted(case.shared).items() if k not in case.spec.weights}
    if case.dense_local:
        shared = {k: v for k, v in shared.items() if k.endswith("bias")}
    control = Canaries(shared.values())
    assert control.found_in(reply.data) >= 0.99 * len(control) > 20
    assert set(shared) <= set(control.found_among(reply.tensors["arrays"])) | {"norm.bias"}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_lie_after_an_honest_message(case: Case, lie: str) -> None:
    """The client has a model of its own by then."""
    device = case.device()
    first = device.send({"arrays": case.honest()})
    second = device.send({"arrays": LIES[lie](case)})
    check([first, second], case)
    again = device.send({"arrays": case.honest()})
    assert again.error == ""
    check([again], case)


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_lie_as_the_first_message(case: Case, lie: str) -> None:
    device = case.device()
    check([device.send({"arrays": LIES[lie](case)}) for _ in range(2)], case)


@pytest.mark.parametrize("secagg", [False, True], ids=["alone", "beside secagg"])
@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_lie_beside_an_honest_record(case: Case, lie: str, place: str, secagg: bool) -> None:
    records = [("arrays", case.honest()), ("more", LIES[lie](case))]
    content: dict[str, Any] = dict(records if place == "second" else reversed(records))
    if secagg:
        content["secaggplus_configs"] = ConfigRecord()
    device = case.device()
    check([device.send(content), device.send(content)], case)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("lie", ["nothing private", "dense", "fedpara", "one layer"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_type_of_message(case: Case, lie: str, kind: str) -> None:
    device = case.device()
    sent = [device.send({"arrays": LIES[lie](case)}, kind)]
    sent += [device.send({"arrays": case.honest()}, kind)]
    sent += [device.send({"arrays": LIES[lie](case)}, kind)]
    check(sent, case)
