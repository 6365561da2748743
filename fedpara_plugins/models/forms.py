"""The form of a model's weights: factors alone, or a frozen weight and an update of it.

With ``base`` unset, the weights decide: fresh ones become factors, trained ones stay as they are
and get factors beside them (the residual form). Trained weights are never replaced in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from torch import Tensor

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.layers.base import full_name
from fedpara_plugins.models.layer_decisions import LEFT_OUT, LayerDecision
from fedpara_plugins.models.looks_trained import norm_has_moved, sign_of_training
from fedpara_plugins.support.torch_seams import own_parameters

__all__ = ["decide_form", "planned_weights"]

SIGNS_SHOWN = 2

NORM_MOVED = "its weights and biases differ from each other, which fresh ones do not"


def decide_form(found: Sequence[LayerDecision], config: FedParaConfig) -> tuple[FedParaConfig, str]:
    """Decide about the form of a model's weights, where the options leave it to them.

    Args:
        found: the decisions about the layers of an unconverted model.
        config: the options.

    Returns:
        The options, and ""; or if the weights decided for the residual form, the options with
        ``base="frozen"``, by which layers must be decided anew, and a sentence about it.

    Raises:
        ConfigError: trained weights would be replaced, or options of the residual form are given
            for fresh weights.
    """
    replaces = config.base != "frozen" and config.init != "fit" and config.trained == "keep"
    signs = list(islice(_signs_of_training(found), SIGNS_SHOWN)) if replaces else []
    count = sum(len(decision.plans) for decision in found)
    decides = config.base is None and config.init == "auto" and config.local == "factors"
    if not signs or not decides:
        if signs:
            raise ConfigError(_refusal(config, signs, count))
        if config.base is None:
            replace(config, base="factors")  # raises for options of the residual form
        return config, ""
    return replace(config, base="frozen"), _note(signs)


def planned_weights(found: Sequence[LayerDecision]) -> dict[str, Tensor]:
    """Return the dense weights that are factorised, by full name."""
    return {
        full_name(decision.name, weight): parameter
        for decision in found
        for weight, parameter in own_parameters(decision.layer).items()
        if weight in decision.plans and parameter is not None
    }


def _signs_of_training(found: Sequence[LayerDecision]) -> Iterator[str]:
    """Yield the weights and norms that look trained, each with the sign by which it does.

    A norm that the patterns leave out says nothing about the layers that they select.
    """
    for decision in found:
        if decision.reasons.get("") != LEFT_OUT and norm_has_moved(decision.layer):
            yield f"norm {decision.name!r}: {NORM_MOVED}"
    for name, weight in planned_weights(found).items():
        if sign := sign_of_training(weight):
            yield f"{name!r}: {sign}"


def _note(signs: Sequence[str]) -> str:
    return (
        f"the model looks trained ({'; '.join(signs)}), so its weights stay as they are and are "
        f"not trained: factors are an update of them that starts at zero (base='frozen'). Other "
        f"choices: init='fit', the closest factors to the weights; trained='discard', fresh ones"
    )


def _refusal(config: FedParaConfig, signs: Sequence[str], count: int) -> str:
    asked = f"init={config.init!r}" if config.base is None else f"base={config.base!r}"
    dense = " (with local='factors')" if config.local == "dense" else ""
    return (
        f"option 'init': the model looks trained ({'; '.join(signs)}), and {asked} would replace "
        f"{count} of its weights by fresh factors. Choose one: base='frozen'{dense} keeps every "
        f"weight as it is and trains factors of an update; init='fit' starts from the closest "
        f"factors to the weights; trained='discard' replaces them, if the guess is wrong or the "
        f"weights are not wanted"
    )
