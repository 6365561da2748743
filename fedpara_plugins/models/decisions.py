"""Which weights of a model are factorised, and why the others stay dense."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, ConversionError
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.planning import plan_weight
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.models.private import matches
from fedpara_plugins.models.weight_checks import (
    is_quantised,
    refuse_unsound,
    refuse_unusable_weight,
    why_no_kind,
)
from fedpara_plugins.models.wrapped import (
    why_bound,
    why_frozen,
)
from fedpara_plugins.plugins import layers, method_named

LEFT_OUT = "left out by the include or exclude patterns"


NAMES_SHOWN = 30


__all__ = ["LEFT_OUT", "Decision", "decisions"]


@dataclass(frozen=True)
class Decision:
    """What happens to one layer of a model.

    Attributes:
        name: of the layer in the model ("" for the model itself).
        layer: the dense layer.
        plans: its weights that are factorised, by attribute; empty if none is.
        reasons: why the others stay dense, by attribute ("" for the layer as a whole).
    """

    name: str
    layer: nn.Module
    plans: dict[str, WeightPlan]
    reasons: dict[str, str]


def decisions(
    model: nn.Module,
    config: FedParaConfig,
    *,
    refused: dict[str, ConversionError] | None = None,
) -> list[Decision]:
    """What `convert` would do or did, for every layer that owns tensors, in the model's order.

    Args:
        model: converted or not.
        config: how it was or would be converted.
        refused: receives the errors by layer, instead of the first one being raised.

    Raises:
        ConfigError: an include or exclude pattern matches no layer.
        ConversionError: a layer is in a state that cannot be converted.
    """
    found = [
        (n, layer)
        for n, layer in model.named_modules()
        if layer._parameters or layer._buffers or is_quantised(layer)
    ]
    _check_patterns(config, [name for name, _ in found])
    owners = _parameter_owners(found)
    decided = []
    for name, layer in found:
        try:
            decided.append(_decide(name, layer, config.for_layer(name), owners))
        except ConversionError as error:
            if refused is None:
                raise
            refused[name] = error
    return decided


def _decide(
    name: str,
    layer: nn.Module,
    config: FedParaConfig,
    owners: dict[int, list[str]],
) -> Decision:
    if isinstance(layer, FactorisedLayer):
        return Decision(name, layer, layer.plans, layer.left_dense)
    method = method_named(config.method)
    if method is None:
        return Decision(name, layer, {}, {"": "method none"})
    if not _selected(name, config):
        return Decision(name, layer, {}, {"": LEFT_OUT})
    refuse_unsound(name, layer, layers())
    kind = layers().get(type(layer))
    if kind is None:
        return Decision(name, layer, {}, {"": why_no_kind(layer, layers())})
    if any(p is not None and not p.numel() for p in layer._parameters.values()):
        return Decision(name, layer, {}, {"": "it has a weight without entries"})
    if bound := why_bound(layer):
        return Decision(name, layer, {}, {"": bound})
    plans: dict[str, WeightPlan] = {}
    reasons: dict[str, str] = {}
    for slot in kind.slots(layer):
        if matches(f"{name}.{slot.name}" if name else slot.name, config.private):
            reasons[slot.name] = "private, so it never travels: factors would save nothing"
            continue
        parameter = layer._parameters.get(slot.name)
        refuse_unusable_weight(name, slot.name, parameter)
        tied = owners[_memory(parameter)]
        if len(tied) > 1:
            others = [t for t in tied if t != name] or ["another weight of the layer"]
            reasons[slot.name] = f"tied to {', '.join(others)}"
            continue
        plan = why_frozen(parameter, config.init) or plan_weight(slot, method, config)
        if isinstance(plan, str):
            reasons[slot.name] = plan
        else:
            plans[slot.name] = plan
    return Decision(name, layer, plans, reasons)


def _parameter_owners(found: list[tuple[str, nn.Module]]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, layer in found:
        for parameter in layer._parameters.values():
            owners.setdefault(_memory(parameter), []).append(name)
    return owners


def _memory(parameter: Tensor | None) -> int:
    """Two parameters over the same memory are tied as well; what has no memory is told by itself.

    A lazy parameter has no memory to ask for.
    """
    if parameter is None or isinstance(parameter, nn.parameter.UninitializedParameter):
        return id(parameter)
    if type(parameter) not in (nn.Parameter, Tensor) or parameter.layout != torch.strided:
        return id(parameter)
    return parameter.data_ptr() or id(parameter)


def _selected(name: str, config: FedParaConfig) -> bool:
    included = not config.include or any(fnmatchcase(name, p) for p in config.include)
    return included and not any(fnmatchcase(name, p) for p in config.exclude)


def _check_patterns(config: FedParaConfig, names: list[str]) -> None:
    overridden = tuple(pattern for pattern, _ in config.overrides)
    for option, patterns in (
        ("include", config.include),
        ("exclude", config.exclude),
        ("overrides", overridden),
    ):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = get_close_matches(pattern, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                listed = ", ".join(names[:NAMES_SHOWN])
                more = len(names) - NAMES_SHOWN
                raise ConfigError(
                    f"option {option!r}: pattern {pattern!r} matches no layer{hint} The model has: "
                    f"{listed}{f', and {more} more' if more > 0 else ''}"
                )
