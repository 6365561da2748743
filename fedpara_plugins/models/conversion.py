"""The conversion of a model: decide about every layer, then replace the layers."""

from __future__ import annotations

import dataclasses
import logging
import warnings
import weakref
from typing import Any, TypeVar

from torch import nn

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.personal import PersonalLinear
from fedpara_plugins.models.attached_config import CONFIG_ATTRIBUTE
from fedpara_plugins.models.decisions import Conversion, decide
from fedpara_plugins.models.first_values import (
    fit_errors,
    fit_summary,
    fit_warning,
    own_starts,
    own_starts_text,
)
from fedpara_plugins.models.layer_decisions import LayerDecision
from fedpara_plugins.models.surgery import replace_layers
from fedpara_plugins.models.trainable import freeze_others
from fedpara_plugins.plugins import layers
from fedpara_plugins.training.optimizer_check import warn_of_earlier_optimizer
from fedpara_plugins.training.step_hooks import attach_progress

__all__ = ["convert", "replace"]

log = logging.getLogger("fedpara")

_told: set[tuple[str, ...]] = set()
"""Names of weights that the log has spoken of: a client builds its model anew in each round."""

_notes_told: set[str] = set()
"""The same of sentences about the form of weights."""

M = TypeVar("M", bound=nn.Module)


def convert(model: M, config: FedParaConfig | None = None, **options: Any) -> M:
    """Replace the layers of a model by factorised ones, in place.

    Fresh weights are replaced by fresh factors. A model whose weights look trained keeps them, as
    parameters that are not trained, and gets factors of an update that starts at zero; or with
    ``init="fit"`` the closest factors to its weights. Only modules change: the model keeps its
    class, its forward and all other parameters. Build the optimizer afterwards, since an earlier
    one still holds the dense weights.

    Args:
        model: any module; a single supported layer is returned as a new module.
        config: all options at once, or
        **options: fields of `FedParaConfig`, such as ``method="fedpara", gamma=0.1``. They replace
            those of ``config``.

    Returns:
        The model itself. With method ``none`` nothing is touched.

    Raises:
        ConfigError: an option is unknown or out of range, a pattern matches no layer, or weights
            that look trained would be replaced by fresh factors.
        ConversionError: nothing to convert, or a layer that cannot be (the message names it).

    Warns:
        UserWarning: hooks on weights are lost; an optimizer that was built before holds weights
            that are replaced; or ``init="fit"`` came no closer to a weight than a relative error of
            0.1.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> convert(model, method="fedpara", gamma=0.5)[0]
        FactorisedLinear(in_features=64, out_features=128, bias=True, fedpara rank 14)
    """
    conversion = decide(model, _complete_config(config, options))
    for text in conversion.warnings:
        warnings.warn(text, stacklevel=2)
    if conversion.note and conversion.note not in _notes_told:
        _notes_told.add(conversion.note)
        log.info("fedpara: %s", conversion.note)
    # Weights without a dot in their names are those of a single layer, which stays in use.
    replaced = {name: weakref.ref(w) for name, w in conversion.weights.items() if "." in name}
    model = replace(model, conversion)
    del conversion  # it holds the dense weights
    warn_of_earlier_optimizer(replaced)
    if coarse := _log_first_values(model):
        warnings.warn(coarse, stacklevel=2)
    return model


def _log_first_values(model: nn.Module) -> str:
    """Log what became of the weights' values; return a warning about a coarse fit, or ""."""
    errors, starts = fit_errors(model), own_starts(model)
    if errors:
        log.info("fedpara: %s", fit_summary(errors))
    if starts and tuple(starts) not in _told:
        _told.add(tuple(starts))
        log.info("fedpara: %s", own_starts_text(starts))
    return fit_warning(errors)


def replace(model: M, conversion: Conversion) -> M:
    """Put factorised layers in the place of those that were decided about.

    Args:
        model: the model that `decide` was asked about; changed in place.
        conversion: the answer.

    Returns:
        The model, or the new layer where the model is a single one.
    """
    config = conversion.config
    if conversion.layers:
        new = {id(d.layer): _factorised(d, conversion) for d in conversion.layers}
        model = new.get(id(model), model)  # type: ignore[assignment]
        replace_layers(model, new)
        if config.base == "frozen":
            freeze_others(model, config)
        attach_progress(model, config)
    if conversion.layers or config.private:
        model.__dict__[CONFIG_ATTRIBUTE] = config
    return model


def _factorised(decision: LayerDecision, conversion: Conversion) -> FactorisedLayer:
    config, options = conversion.config, {}
    kind = layers().get(type(decision.layer))
    if decision.name == conversion.head:
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
    if config.init in ("seeded", "auto"):
        layer.start_seeded()
    layer.left_dense = decision.reasons
    layer.own_starts = dict(decision.own_starts)
    return layer


def _complete_config(config: FedParaConfig | None, options: dict[str, Any]) -> FedParaConfig:
    if config is None:
        if "clip" in options and options["clip"] is None:
            options = {**options, "clip": "none"}  # in a mapping, None stands for the default
        return FedParaConfig.from_mapping({"method": "fedpara", **options})
    if not isinstance(config, FedParaConfig):
        raise ConfigError(
            f"config: expected a FedParaConfig, got {type(config).__name__}. Read a mapping with "
            f"FedParaConfig.from_mapping(), or give single options by name (method=..., gamma=...)"
        )
    given = {key: value for key, value in options.items() if value is not None}
    FedParaConfig.from_mapping(given)  # names the option that is unknown
    return dataclasses.replace(config, **options) if options else config
