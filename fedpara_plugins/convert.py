"""Model in, the same model with factorised layers out; and back to dense."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedpara_plugins.bound import refuse_wrapped, warn_of_weight_hooks, why_bound, why_frozen
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, ConversionError
from fedpara_plugins.freshness import looks_trained, norm_has_moved
from fedpara_plugins.heads import choose_head
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.personal import PersonalLinear
from fedpara_plugins.optimizer_check import warn_of_earlier_optimizer
from fedpara_plugins.own_state import matches, own_tensors
from fedpara_plugins.plan import WeightPlan, plan_weight
from fedpara_plugins.plugins import layers, method_named
from fedpara_plugins.reach import refuse_unreachable_ratios
from fedpara_plugins.replacing import copy_of, replace_layers
from fedpara_plugins.soundness import (
    holds_nan,
    is_quantised,
    refuse_unsound,
    refuse_unusable_weight,
    why_no_kind,
)
from fedpara_plugins.training import attach

__all__ = ["Decision", "config_of", "convert", "decisions", "to_dense"]

CONFIG_ATTRIBUTE = "_fedpara_config"
"""Where a converted model keeps its config: a plain attribute, so it is copied and pickled."""

LEFT_OUT = "left out by the include or exclude patterns"
NAMES_SHOWN = 30

M = TypeVar("M", bound=nn.Module)


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


def convert(model: M, config: FedParaConfig | None = None, **options: Any) -> M:
    """Replace the layers of a model by factorised ones, in place.

    The factors are fresh ones, or with ``init="fit"`` the closest to the weights the model has.
    Only modules change; the model keeps its class, its forward and all other parameters. Build the
    optimizer afterwards: one built before still holds the dense weights.

    Args:
        model: any module; a single supported layer is returned as a new module.
        config: all options at once, or
        **options: fields of `FedParaConfig`, such as ``method="fedpara", gamma=0.1``. Options
            given here replace those of ``config``.

    Returns:
        The model itself. With method ``none`` nothing is touched.

    Raises:
        ConfigError: an option is unknown or out of range, or a pattern matches no layer.
        ConversionError: nothing to convert, or a layer that cannot be (the message names it).

    Warns:
        UserWarning: weights look trained, and ``init`` does not say what is to become of them; or
            an optimizer is alive that was built before and holds weights that are replaced.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> convert(model, method="fedpara", gamma=0.5)[0]
        FactorisedLinear(in_features=64, out_features=128, bias=True, fedpara rank 14)
    """
    config = _configured(config, options)
    _check_model(model)
    if method_named(config.method) is None:
        return _unconverted(model, config)
    own_tensors(model, config.private)  # its patterns must match, before anything is changed
    _refuse_already_converted(model)
    refuse_wrapped(model)
    found = decisions(model, config)
    _refuse_shared_modules(model, found)
    refuse_unreachable_ratios(_by_ratio(found, config))
    if not any(decision.plans for decision in found):
        reasons = "\n".join(_reason_lines(found))
        raise ConversionError(f"no layer of the model can be factorised:\n{reasons}")
    plans = [plan for decision in found for plan in decision.plans.values()]
    head = choose_head(model, config, private_factors=any(p.private_names for p in plans))
    if config.init is None:
        _warn_if_trained(found)
    warn_of_weight_hooks(_planned_weights(found))
    replaced = _replaced_weights(found)
    layers_by_id = {}
    for decision in found:
        if not decision.plans and decision.name != head:
            continue
        new = _replacement(decision, config, is_head=decision.name == head)
        new.left_dense = decision.reasons
        layers_by_id[id(decision.layer)] = new
    model = layers_by_id.get(id(model), model)  # type: ignore[assignment]
    replace_layers(model, layers_by_id)
    model.__dict__[CONFIG_ATTRIBUTE] = config
    attach(model, config)
    del found, decision  # they hold the dense layers
    warn_of_earlier_optimizer(replaced)
    return model


def _replacement(decision: Decision, config: FedParaConfig, *, is_head: bool) -> FactorisedLayer:
    kind, options = layers().get(type(decision.layer)), {}
    if is_head:
        kind = PersonalLinear
        options = {"correction": config.private_head, "label_prior": config.label_prior}
    assert kind is not None
    layer = kind.from_dense(
        decision.layer,
        decision.plans,
        name=decision.name,
        seed=config.seed,
        fit=config.init == "fit",
        **options,
    )
    if config.init == "seeded":
        layer.start_seeded(name=decision.name, seed=config.seed)
    return layer


def _unconverted(model: M, config: FedParaConfig) -> M:
    """Only what the user keeps private needs to be remembered, for `ModelSpec`."""
    if config.private:
        own_tensors(model, config.private)
        model.__dict__[CONFIG_ATTRIBUTE] = config
    return model


def _by_ratio(
    found: list[Decision], config: FedParaConfig
) -> Iterator[tuple[str, WeightPlan, float]]:
    for decision in found:
        ratio = config.for_layer(decision.name).ratio
        if ratio is None:
            continue
        for weight, plan in decision.plans.items():
            yield ".".join(part for part in (decision.name, weight) if part), plan, ratio


def _replaced_weights(found: list[Decision]) -> dict[str, weakref.ref[Tensor]]:
    """The dense weights that are about to go; not that of a single layer, which stays in use."""
    weights = _planned_weights([decision for decision in found if decision.name])
    return {name: weakref.ref(weight) for name, weight in weights.items()}


def _planned_weights(found: list[Decision]) -> dict[str, Tensor]:
    return {
        f"{decision.name}.{weight}" if decision.name else weight: parameter
        for decision in found
        for weight, parameter in decision.layer._parameters.items()
        if weight in decision.plans and parameter is not None
    }


def _warn_if_trained(found: list[Decision]) -> None:
    """Norms that the patterns leave out say nothing about the layers that they let in."""
    replaced = [(decision, weight) for decision in found for weight in decision.plans]
    signs = [
        ".".join(part for part in (decision.name, weight) if part)
        for decision, weight in replaced
        if looks_trained(getattr(decision.layer, weight))
    ]
    signs += [
        decision.name
        for decision in found
        if decision.reasons.get("") != LEFT_OUT and norm_has_moved(decision.layer)
    ]
    if signs:
        warnings.warn(
            f"the model looks trained ({', '.join(signs[:3])}{', ...' if len(signs) > 3 else ''}), "
            f"and {len(replaced)} weights are replaced by fresh factors. Say which you want: "
            f"init='fit' starts from the closest factors, init='random' from fresh ones.",
            stacklevel=3,
        )


def to_dense(model: M) -> M:
    """A dense copy of a converted model, whose state the unconverted model loads strictly.

    The copy shares no tensor with ``model``, which stays as it is. For pFedPara it is the model
    of whoever calls: with private factors at zero, the shared W1.

    Raises:
        ConversionError: a value is NaN, or a factorised layer's infinite; or not a model.
    """
    _check_model(model)
    dense = copy_of(model)
    dense.__dict__.pop(CONFIG_ATTRIBUTE, None)
    layers_by_id: dict[int, nn.Module] = {}
    for name, layer in dense.named_modules():
        if not isinstance(layer, FactorisedLayer):
            _refuse_nan(name, layer)
            continue
        try:
            layers_by_id[id(layer)] = layer.to_dense()
        except ConversionError as error:
            raise ConversionError(f"layer {name!r}: {error}") from error
    result = layers_by_id.get(id(dense), dense)
    replace_layers(result, layers_by_id)
    return result  # type: ignore[return-value]


def _refuse_nan(name: str, layer: nn.Module) -> None:
    for attribute, parameter in layer._parameters.items():
        if parameter is None or isinstance(parameter, nn.parameter.UninitializedParameter):
            continue
        if holds_nan(parameter):
            raise ConversionError(
                f"layer {name!r}: {attribute} holds NaN: the training has diverged. Go back to an "
                f"earlier state, and see the option clip"
            )


def config_of(model: nn.Module) -> FedParaConfig:
    """The config that a model was converted with; method ``none`` if it never was."""
    found = model.__dict__.get(CONFIG_ATTRIBUTE)
    return found if isinstance(found, FedParaConfig) else FedParaConfig()


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


def _refuse_already_converted(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, FactorisedLayer):
            raise ConversionError(
                f"layer {name!r} is already factorised: convert a fresh model, or go back with "
                f"to_dense() first"
            )


def _refuse_shared_modules(model: nn.Module, found: list[Decision]) -> None:
    """One module in two places cannot be replaced in one of them without untying the two."""
    replaced = {id(decision.layer): decision.name for decision in found if decision.plans}
    for name, layer in model.named_modules(remove_duplicate=False):
        first = replaced.get(id(layer), name)
        if first != name:
            raise ConversionError(
                f"layers {first!r} and {name!r} are one and the same module: give each place a "
                f"module of its own (copy.deepcopy), or exclude {first!r} from conversion"
            )


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


def _reason_lines(found: list[Decision]) -> Iterator[str]:
    if not found:
        yield "  it has no parameters"
    for decision in found:
        for weight, reason in decision.reasons.items():
            name = ".".join(part for part in (decision.name, weight) if part) or "(model)"
            yield f"  {name}: {reason}"


def _configured(config: FedParaConfig | None, options: dict[str, Any]) -> FedParaConfig:
    if config is None:
        return FedParaConfig.from_mapping({"method": "fedpara", **options})
    if not isinstance(config, FedParaConfig):
        raise ConfigError(
            f"config: expected a FedParaConfig, got {type(config).__name__}. Read a mapping with "
            f"FedParaConfig.from_mapping(), or give single options by name (method=..., gamma=...)"
        )
    given = {key: value for key, value in options.items() if value is not None}
    FedParaConfig.from_mapping(given)  # names the option that is unknown
    return replace(config, **options) if options else config


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        what = "the class" if isinstance(model, type) else f"a {type(model).__name__}"
        hint = f"call it: {model.__name__}()" if isinstance(model, type) else "give the model"
        raise ConversionError(f"model: expected a torch.nn.Module, got {what}; {hint}")
