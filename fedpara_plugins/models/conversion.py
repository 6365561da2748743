"""Model in, the same model with factorised layers out; and back to dense."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, ConversionError
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.ratio_check import refuse_unreachable_ratios
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.personal import PersonalLinear
from fedpara_plugins.models.attached_config import CONFIG_ATTRIBUTE
from fedpara_plugins.models.decisions import LEFT_OUT, Decision, decisions
from fedpara_plugins.models.head import choose_head
from fedpara_plugins.models.looks_trained import looks_trained, norm_has_moved
from fedpara_plugins.models.private import own_tensors
from fedpara_plugins.models.surgery import replace_layers
from fedpara_plugins.models.weight_checks import check_model
from fedpara_plugins.models.wrapped import (
    refuse_wrapped,
    warn_of_weight_hooks,
)
from fedpara_plugins.plugins import layers, method_named
from fedpara_plugins.training.optimizer_check import warn_of_earlier_optimizer
from fedpara_plugins.training.step_hooks import attach

__all__ = ["convert"]


M = TypeVar("M", bound=nn.Module)


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
    check_model(model)
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
