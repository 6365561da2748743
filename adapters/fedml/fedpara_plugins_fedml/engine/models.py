"""The project's model: converted as the keys say, and a copy of it for the server."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fedpara_plugins import ConversionError, ModelSpec
from fedpara_plugins.exchange import (
    convert_or_keep,
    converted_copy,
    is_apart,
    log_idle_options,
    plain_spec,
    zero_private_factors,
)
from fedpara_plugins.models import StatePart, find_part, frozen_tensors, shapes_of, static_buffers
from fedpara_plugins_fedml.settings import FedMLSettings, naming_keys

__all__ = [
    "buffers_of",
    "check_names_for",
    "client_model",
    "converted",
    "dense_of",
    "exchanged",
    "frozen_of",
    "plain_state",
    "server_copy",
    "spec_for",
    "to_state",
]


log = logging.getLogger("fedpara.fedml")

State = dict[str, Tensor]

SERVER_ALONE = ("FedAvg", "FedOpt")
"""Optimizers that act on the server alone, and so on any names."""


def converted(model: Any, settings: FedMLSettings) -> nn.Module:
    """Convert the project's model in place, and return it.

    Raises:
        ConversionError: it cannot be converted; the message names the layer and the remedy.
        ConfigError: a pattern matches no layer.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(
            f"fedpara: FedMLRunner got a {type(model).__name__} as its model; the plugin works on "
            f"torch.nn.Module. Remove the fedpara_* keys from the YAML for other engines"
        )
    with naming_keys():
        return convert_or_keep(model, settings.config)


def client_model(model: Any, settings: FedMLSettings) -> tuple[nn.Module, nn.Module]:
    """Return what a client trains, and that model as factors: the same object if it trains these.

    With the key ``fedpara_local: dense`` the first is the project's own model as it is.

    Raises:
        ConversionError, ConfigError: see `converted`.
    """
    if not settings.trains_dense or not isinstance(model, nn.Module):
        own = converted(model, settings)
        return own, own
    log_idle_options(settings.config)
    with naming_keys():
        return model, converted_copy(model, settings.config)


def server_copy(model: nn.Module) -> nn.Module:
    """Return the server's model, of its own memory: W1, with private factors at zero."""
    own = copy.deepcopy(model)
    zero_private_factors(own)
    return own


def exchanged(model: nn.Module, names: Collection[str]) -> ModelSpec:
    """Return the spec of what a project exchanges of its plain model.

    Args:
        model: the same, converted.
        names: of the plain model's state.

    Raises:
        ConversionError: names that the model has not.
    """
    spec = ModelSpec.of(model)
    factors = {name: spec.factor_keys(name).values() for name in spec.weights}
    return spec_for(model, [key for name in names for key in factors.get(name, [name])])


def spec_for(model: nn.Module, names: Collection[str] | Mapping[str, Tensor]) -> ModelSpec:
    """Return the spec of what a project exchanges of its model: all of the state, or a part.

    A factorised weight that does not travel at all is the project's own, like all other names that
    do not. A part may have other names, see `models.find_part`.

    Args:
        model: converted.
        names: of what is exchanged; with the tensors, other names can be understood.

    Raises:
        ConversionError: names that the model has not, where a part of it is private or factorised
            and it cannot be told which part these are; or some of a weight's factors.
    """
    spec = ModelSpec.of(model)
    if isinstance(names, Mapping) and not set(names) <= set(spec.keys):
        part = part_under_other_names(model, names)
        if part is not None:
            return part.spec
        if is_apart(plain_spec(names), spec) and not spec.private_keys:
            log.info(
                "fedpara: it cannot be told which part of the model get_model_params() gives (%d "
                "tensors, the first %r): the codec alone acts on it",
                len(names), next(iter(names), ""),
            )  # fmt: skip
            return plain_spec(names)
    kept = set(names)
    if strange := sorted(kept - set(spec.keys)):
        raise ConversionError(
            f"fedpara: get_model_params() gives {strange[0]!r} ({len(strange)} such names), which "
            f"the model's state_dict() has not; the plugin needs the state's own names"
        )
    if kept == set(spec.keys):
        return spec
    weights = {}
    for weight, plan in spec.weights.items():
        factors = set(spec.factor_keys(weight).values())
        if missing := sorted(factors - kept):
            if factors & kept:
                raise ConversionError(
                    f"fedpara: get_model_params() gives {sorted(factors & kept)[0]!r} and not "
                    f"{missing[0]!r}, both factors of {weight!r}: exchange all factors of a weight "
                    f"or none, or leave the layer dense (fedpara_exclude)"
                )
            continue
        weights[weight] = plan
    return replace(
        spec,
        weights=weights,
        keys=tuple(key for key in spec.keys if key in kept),
        own={key: own for key, own in spec.own.items() if key in kept},
    )


def check_names_for(optimizer: str, model: nn.Module, names: Collection[str]) -> None:
    """Raise for an optimizer of clients where what is exchanged has other names than the model.

    Args:
        optimizer: its name.
        model: converted.
        names: of what is exchanged.

    Raises:
        ConversionError: it would correct nothing.
    """
    other = [name for name in names if name not in model.state_dict()]
    if other and optimizer not in SERVER_ALONE:
        raise ConversionError(
            f"fedpara: get_model_params() gives {other[0]!r}, which the model's state_dict() has "
            f"not, and {optimizer} corrects the clients' steps by the state's own names: exchange "
            f"those, or set federated_optimizer to one of {', '.join(SERVER_ALONE)}"
        )


def frozen_of(model: nn.Module, names: Collection[str] | Mapping[str, Tensor]) -> State:
    """Return copies of the frozen tensors among what a project exchanges, buffers too.

    Args:
        model: the project's, converted or plain.
        names: of what is exchanged.
    """
    frozen = {**frozen_tensors(model), **static_buffers(model)}
    own = _own_names(model, names)
    return {name: frozen[key].detach().cpu().clone() for name, key in own.items() if key in frozen}


def buffers_of(model: nn.Module, names: Collection[str] | Mapping[str, Tensor]) -> frozenset[str]:
    """Return the names of those of `frozen_of` that are buffers, for the same arguments."""
    buffers = static_buffers(model)
    return frozenset(name for name, key in _own_names(model, names).items() if key in buffers)


def _own_names(model: nn.Module, names: Collection[str] | Mapping[str, Tensor]) -> dict[str, str]:
    """Return the model's own names of what a project exchanges, by the project's names."""
    if isinstance(names, Mapping) and not set(names) <= set(model.state_dict()):
        part = part_under_other_names(model, names)
        return {} if part is None else dict(part.names)
    return {name: name for name in names}


def dense_of(model: nn.Module, exchanged: Mapping[str, Tensor], *, private: bool) -> State:
    """Return the plain model's state, ready for ``load_state_dict(strict=True)``.

    Args:
        model: converted; what the project does not exchange is taken from it.
        exchanged: all other names.
        private: whether private factors count; without them it is the shared W1.
    """
    spec = ModelSpec.of(model)
    own = to_state(model.state_dict())
    part = None if set(exchanged) <= set(own) else part_under_other_names(model, exchanged)
    named = exchanged if part is None else {part.names[n]: v for n, v in exchanged.items()}
    left_out = frozenset() if private else spec.private_factors
    state = {k: v for k, v in {**own, **named}.items() if k not in left_out}
    return {**{k: v for k, v in named.items() if k not in own}, **spec.dense_state(state)}


def part_under_other_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> StatePart | None:
    """Return the part of a model's state that tensors are which have names of their own.

    Args:
        model: converted.
        tensors: of the part.
    """
    known = [(ModelSpec.of(model), shapes_of(model.state_dict()))]
    return find_part(known, shapes_of(tensors))


def to_state(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy to the CPU: FedML's trainers hand out the very tensors that they go on training."""
    return {str(name): value.detach().cpu().clone() for name, value in params.items()}


def plain_state(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Copy in the form that FedML's hooks expect (a plain dict means something else there)."""
    return OrderedDict((name, value.clone()) for name, value in state.items())
