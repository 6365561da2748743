"""Decisions about single layers: which weights are factorised, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, ConversionError
from fedpara_plugins.factors.plan import WeightPlan, WeightSlot
from fedpara_plugins.factors.planning import plan_weight
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.base import full_name
from fedpara_plugins.models.adapters import why_adapter
from fedpara_plugins.models.norms import first_norm
from fedpara_plugins.models.private import matches
from fedpara_plugins.models.weight_checks import (
    refuse_unusable_layer,
    refuse_unusable_weight,
    refuse_without_values,
    spread_of,
    why_no_kind,
)
from fedpara_plugins.models.wrapped import why_forward_replaced, why_frozen
from fedpara_plugins.plugins import layers, method_named
from fedpara_plugins.support.torch_seams import is_quantised, own_buffers, own_parameters

__all__ = ["LEFT_OUT", "LayerDecision", "decide_layers"]

LEFT_OUT = "left out by the include or exclude patterns"

NAMES_SHOWN = 30
"""Number of layers that the error about a pattern names."""


@dataclass(frozen=True)
class LayerDecision:
    """What a conversion does to one layer of a model.

    Attributes:
        name: the layer's name in the model, "" for the model itself.
        layer: the dense layer, or the factorised one of a converted model.
        plans: the weights that are factorised, by attribute; empty if there are none.
        reasons: why other weights stay dense, by attribute; "" stands for the whole layer.
        own_starts: standard deviation of each fresh weight that keeps the dense weight's instead of
            its kind's default, by attribute.
    """

    name: str
    layer: nn.Module
    plans: dict[str, WeightPlan]
    reasons: dict[str, str]
    own_starts: Mapping[str, float] = field(default_factory=dict)


def decide_layers(
    model: nn.Module,
    config: FedParaConfig,
    *,
    refused: dict[str, ConversionError] | None = None,
) -> list[LayerDecision]:
    """Return what `convert` would do, or did, to every layer with tensors, in the model's order.

    Args:
        model: converted or not.
        config: how it was or would be converted.
        refused: receives the errors by layer; without it the first error is raised.

    Raises:
        ConfigError: a pattern of include, exclude or overrides matches no layer.
        ConversionError: a layer is in a state that cannot be converted.
    """
    found = [
        (name, layer)
        for name, layer in model.named_modules()
        if own_parameters(layer) or own_buffers(layer) or is_quantised(layer)
    ]
    _check_patterns(config, [name for name, _ in found])
    owners = _parameter_owners(found)
    norms = first_norm(model) is not None
    decided = []
    for name, layer in found:
        try:
            decided.append(_decide_layer(name, layer, config.for_layer(name), owners, norms))
        except ConversionError as error:
            if refused is None:
                raise
            refused[name] = error
    return decided


def _decide_layer(
    name: str, layer: nn.Module, config: FedParaConfig, owners: dict[int, list[str]], norms: bool
) -> LayerDecision:
    if isinstance(layer, FactorisedLayer):
        return LayerDecision(name, layer, layer.plans, layer.left_dense, layer.own_starts)
    if reason := _why_left_dense(name, layer, config):
        return LayerDecision(name, layer, {}, {"": reason})
    plans: dict[str, WeightPlan] = {}
    reasons: dict[str, str] = {}
    starts: dict[str, float] = {}
    for slot in layers()[type(layer)].slots(layer):
        plan = _decide_weight(name, slot, layer, config, owners, norms)
        if isinstance(plan, str):
            reasons[slot.name] = plan
            continue
        plans[slot.name] = plan
        if plan.start != 1 and config.init != "fit" and not plan.residual:
            starts[slot.name] = plan.start * plan.variance**0.5
    return LayerDecision(name, layer, plans, reasons, starts)


def _why_left_dense(name: str, layer: nn.Module, config: FedParaConfig) -> str:
    """Return why a layer stays dense as a whole; "" if its weights are decided one by one."""
    if method_named(config.method) is None:
        return "method none"
    if not _is_selected(name, config):
        return LEFT_OUT
    if not _is_included(name, config) and (reason := why_adapter(name, layer)):
        return reason
    kinds = layers()
    refuse_unusable_layer(name, layer, kinds)
    if type(layer) not in kinds:
        return why_no_kind(layer, kinds)
    if any(p is not None and not p.numel() for p in own_parameters(layer).values()):
        return "it has a weight without entries"
    return why_forward_replaced(layer)


def _decide_weight(
    name: str,
    slot: WeightSlot,
    layer: nn.Module,
    config: FedParaConfig,
    owners: dict[int, list[str]],
    norms: bool,
) -> WeightPlan | str:
    """Return the plan of one weight, or why it stays dense.

    Args:
        name: of the layer.
        slot: the weight.
        layer: the dense layer.
        config: the layer's options.
        owners: of each parameter, by memory.
        norms: whether the model has norm layers.
    """
    if matches(full_name(name, slot.name), config.private):
        return "private, so it never travels: factors would save nothing"
    parameter = own_parameters(layer).get(slot.name)
    refuse_unusable_weight(name, slot.name, parameter)
    tied = owners[_memory(parameter)]
    if len(tied) > 1:
        others = [t for t in tied if t != name] or ["another weight of the layer"]
        return f"tied to {', '.join(others)}"
    if config.base != "frozen" and (reason := why_frozen(parameter)):
        return reason
    method = method_named(config.method)
    assert method is not None
    assert parameter is not None
    if config.init == "fit":  # fitted factors follow the weight by themselves
        refuse_without_values(name, slot.name, parameter)
        return plan_weight(slot, method, config)
    return plan_weight(slot, method, config, spread=spread_of(parameter), without_norms=not norms)


def _parameter_owners(found: Iterable[tuple[str, nn.Module]]) -> dict[int, list[str]]:
    """Return the names of the layers that own each parameter, by `_memory`."""
    owners: dict[int, list[str]] = {}
    for name, layer in found:
        for parameter in own_parameters(layer).values():
            owners.setdefault(_memory(parameter), []).append(name)
    return owners


def _memory(parameter: Tensor | None) -> int:
    """Return a key that tied parameters have in common: their memory, or the object without one.

    Two parameters over the same memory are tied as well. A lazy parameter has none to ask for.
    """
    if parameter is None or isinstance(parameter, UninitializedParameter):
        return id(parameter)
    if type(parameter) not in (nn.Parameter, Tensor) or parameter.layout != torch.strided:
        return id(parameter)
    return parameter.data_ptr() or id(parameter)


def _is_selected(name: str, config: FedParaConfig) -> bool:
    included = not config.include or _is_included(name, config)
    return included and not any(fnmatchcase(name, p) for p in config.exclude)


def _is_included(name: str, config: FedParaConfig) -> bool:
    return any(fnmatchcase(name, p) for p in config.include)


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
