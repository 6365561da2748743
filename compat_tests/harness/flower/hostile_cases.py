"""Clients with private state, and descriptions by which a server may try to get it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import fedpara_plugins as core
import fedpara_plugins_flower as fedpara
from fedpara_plugins.models import ModelSpec
from harness.flower.hostile_server import (
    Described,
    Device,
    Net,
    Reply,
    described,
    planted,
    private_names,
)
from harness.processes.canaries import Canaries

__all__ = [
    "CASES",
    "LIES",
    "OPTIONS",
    "Case",
    "check_nothing_left",
    "check_refused",
    "section",
]

OPTIONS = {"gamma": 0.3, "min_size": 1}
TYPED = ("MismatchError", "ConfigError", "PayloadError", "fedpara: ")


class Case:
    """A client's options, its model, and what is private by them.

    Args:
        method: its own.
        patterns: of the option ``private``, with commas.
        factorised: whether its code has that line.
        options: further ones.

    Attributes:
        section: the run's config.
        spec: of its own model.
        state: of its own model, at first.
        private: names of that state which stay on the device.
        shared: the rest of the state.
    """

    def __init__(
        self, method: str, patterns: str = "", *, factorised: bool = True, **options: Any
    ) -> None:
        self.factorised = factorised
        self.local = str(options.get("local", "factors"))
        self.options: dict[str, Any] = {**OPTIONS, "method": method, "private": patterns, **options}
        self.section = section(self.options)
        self.config = core.FedParaConfig.from_mapping(self.options)
        model = core.convert(Net(), self.config)
        self.spec = ModelSpec.of(model)
        self.state = dict(model.state_dict())
        names = patterns.split(",") if patterns else []
        self.private = private_names(list(self.state), method=method, patterns=names)
        self.shared = {k: v for k, v in self.state.items() if k not in self.private}

    @property
    def knows_model(self) -> bool:
        """Tell whether the plugin gets to know the client's own model."""
        return self.factorised

    def device(self, **changes: Any) -> Device:
        """Return a client of this kind, without any state."""
        net = fedpara.factorised(lambda: Net()) if self.factorised else Net
        return Device(net, **{"mods": [fedpara.client_mod], "run_config": self.section, **changes})

    def honest(self) -> Described:
        """Return the record of an honest server."""
        return described(self.spec.to_json(), self.shared)

    @cached_property
    def secrets(self) -> Canaries:
        """Return what the client has trained: private tensors, and weights of them."""
        values = list(planted({k: self.state[k] for k in self.private}).values())
        halves = [w for w, plan in self.spec.weights.items() if plan.private_names]
        dense = self.spec.dense_state(planted(self.state))
        values += [dense[weight] for weight in halves]
        if self.local == "dense":
            values += planted({weight: dense[weight] for weight in halves}).values()
        return Canaries(values)


def section(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as Flower flattens a run's config."""
    return {f"fedpara.{key.replace('_', '-')}": value for key, value in options.items()}


CASES = {
    "pfedpara": Case("pfedpara"),
    "private head": Case("none", "head.*"),
    "private head, plain app": Case("none", "head.*", factorised=False),
    "private norm and factors": Case("fedpara", "norm.*"),
    "all": Case("pfedpara", "norm.*,head.bias"),
    "dense": Case("pfedpara", local="dense"),
    "dense, plain app": Case("pfedpara", local="dense", factorised=False),
}


# What is asserted ---------------------------------------------------------------------------------


def check_nothing_left(case: Case, *replies: Reply) -> None:
    """Assert that nothing private has left the device."""
    assert len(case.secrets) > 50
    for reply in replies:
        assert case.secrets.found_in(reply.data) == 0
        for tensors in reply.tensors.values():
            assert case.secrets.found_among(tensors, close=False) == []
            assert not {name.removeprefix("_orig_mod.") for name in tensors} & case.private


def check_refused(reply: Reply, *, before: bool = True) -> None:
    """Assert a typed error.

    Args:
        reply: what came back.
        before: whether the user's code must not have been called.
    """
    assert any(word in reply.error for word in TYPED), reply.error or sorted(reply.content)
    assert not (before and reply.ran)


# Lies ---------------------------------------------------------------------------------------------


def _lie(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> Described:
    """Return a description of these tensors that is sound by itself."""
    return described(spec.to_json(), tensors)


def _plain(state: Mapping[str, Tensor]) -> Described:
    return _lie(ModelSpec(weights={}, keys=tuple(state), seed=0), state)


def _converted(model: nn.Module) -> Described:
    return _lie(ModelSpec.of(model), core.split(model).shared)


def _nothing_private(case: Case) -> Described:
    return _plain(case.state)


def _shared_alone(case: Case) -> Described:
    return _plain(case.shared)


def _dense(case: Case) -> Described:
    return _plain(Net().state_dict())


def _with(**options: Any) -> Callable[[Case], Described]:
    def lie(case: Case) -> Described:
        changed = {**case.options, "private": "", "local": "factors", **options}
        return _converted(core.convert(Net(), core.FedParaConfig.from_mapping(changed)))

    return lie


def _one_layer(case: Case) -> Described:
    """Describe one layer as the client may expect it, and the rest as plain."""
    config = core.FedParaConfig(method="pfedpara", gamma=0.3, min_size=1, exclude=("head",))
    return _converted(core.convert(Net(), config))


def _one_private_less(case: Case) -> Described:
    """Describe the client's model, where one private name is called shared."""
    last = max(case.private)
    own = {key: value for key, value in case.spec.own.items() if key != last}
    weights = {
        weight: plan
        for weight, plan in case.spec.weights.items()
        if last not in case.spec.factor_keys(weight).values()
    }
    spec = ModelSpec(weights, case.spec.keys, case.spec.seed, own)
    return _lie(spec, {key: case.state[key] for key in spec.shared_keys})


def _wrapped(case: Case) -> Described:
    """Describe the names of a model in a wrapper, all of them shared."""
    return _plain({f"_orig_mod.{key}": value for key, value in case.state.items()})


def _wrapped_besides(case: Case) -> Described:
    names = [f"_orig_mod.{key}" for key in sorted(case.private)]
    keys = (*case.spec.keys, *names)
    spec = ModelSpec(case.spec.weights, keys, case.spec.seed, case.spec.own)
    more = {name: case.state[name.removeprefix("_orig_mod.")] for name in names}
    return _lie(spec, {**case.shared, **more})


def _another_model(case: Case) -> Described:
    """Describe a larger model, which has the client's names too."""
    return _plain({**case.state, "more.weight": torch.zeros(3, 3)})


def _positions(case: Case) -> Described:
    return _plain({str(place): value for place, value in enumerate(case.state.values())})


def _other_names(case: Case) -> Described:
    """Exchange names of private tensors and of shared ones of the same shape."""
    return _reordered(case, [_exchanged(key) for key in case.spec.keys])


def _exchanged(key: str) -> str:
    pairs = {".x1": ".x2", ".x2": ".x1", ".y1": ".y2", ".y2": ".y1"}
    pairs |= {"norm.weight": "norm.bias", "norm.bias": "norm.weight"}
    return next((key.removesuffix(a) + b for a, b in pairs.items() if key.endswith(a)), key)


def _other_order(case: Case) -> Described:
    return _reordered(case, list(reversed(case.spec.keys)))


def _reordered(case: Case, keys: Sequence[str]) -> Described:
    spec = ModelSpec(case.spec.weights, tuple(keys), case.spec.seed, case.spec.own)
    return _lie(spec, {key: case.state[key] for key in spec.shared_keys})


def _other_seed(case: Case) -> Described:
    return _lie(ModelSpec(case.spec.weights, case.spec.keys, 77, case.spec.own), case.shared)


def _no_description(case: Case) -> Described:
    return described(None, case.state)


def _further_fields(case: Case) -> Described:
    """Describe the client's own model, with requests that no client knows."""
    model = {**case.spec.to_json(), "private_keys": [], "shared": sorted(case.private)}
    extra = {"private": [], "send": sorted(case.private), "codecs": ["none", "none"]}
    return described(model, case.shared, extra=extra)


LIES: dict[str, Callable[[Case], Described]] = {
    "nothing private": _nothing_private,
    "shared alone": _shared_alone,
    "dense": _dense,
    "fedpara": _with(method="fedpara"),
    "lowrank": _with(method="lowrank"),
    "pfedpara": _with(method="pfedpara"),
    "another rank": _with(method="pfedpara", gamma=0.6),
    "tanh": _with(method="pfedpara", tanh=True),
    "norm private": _with(method="pfedpara", private="norm.*"),
    "one layer": _one_layer,
    "one private less": _one_private_less,
    "wrapped": _wrapped,
    "wrapped besides": _wrapped_besides,
    "another model": _another_model,
    "positions": _positions,
    "other names": _other_names,
    "other order": _other_order,
    "other seed": _other_seed,
    "no description": _no_description,
    "further fields": _further_fields,
}
"""By name, what makes a record for a client of a case. Some are the truth for some cases."""
