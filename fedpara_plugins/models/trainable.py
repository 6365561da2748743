"""Which parameters a model in the residual form trains besides its factors.

The option ``trainable`` lists patterns of full names, such as ``head.*`` or ``*norm*``. All other
parameters of the model are frozen, but for those that stay on the device by ``private``.
"""

from __future__ import annotations

from difflib import get_close_matches

from torch import nn

from fedpara_plugins.config import EVERYTHING, FedParaConfig
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.base import own_keys
from fedpara_plugins.models.private import matches

__all__ = ["check_trainable", "freeze_others"]

NAMES_SHOWN = 30


def check_trainable(model: nn.Module, config: FedParaConfig) -> None:
    """Raise for a pattern that matches no parameter of the unconverted model.

    Raises:
        ConfigError: names the pattern, the nearest name, and the names there are.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in config.trainable:
        if pattern not in EVERYTHING and not any(matches(name, (pattern,)) for name in names):
            near = get_close_matches(pattern, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            more = len(names) - NAMES_SHOWN
            raise ConfigError(
                f"option 'trainable': pattern {pattern!r} matches no parameter{hint} The model "
                f"has: {', '.join(names[:NAMES_SHOWN])}{f', and {more} more' if more > 0 else ''}"
            )


def freeze_others(model: nn.Module, config: FedParaConfig) -> None:
    """Set ``requires_grad`` of all parameters that are no factors, as the options say.

    Args:
        model: converted to the residual form; changed in place.
        config: its options.
    """
    own = {
        id(layer.get_parameter(key))
        for layer in model.modules()
        if isinstance(layer, FactorisedLayer)
        for plan in layer.plans.values()
        for key in own_keys(plan)
    }
    asked = tuple(pattern for pattern in config.trainable if pattern not in EVERYTHING)
    named = list(model.named_parameters(remove_duplicate=False))  # tied ones have several names
    trained = {id(p) for name, p in named if matches(name, asked)}
    kept = {id(p) for name, p in named if matches(name, config.private)}
    if config.trainable != asked:  # "*" stands among them
        kept = {id(p) for _, p in named}
    for _, parameter in named:
        if id(parameter) in own or not parameter.is_floating_point():
            continue
        if id(parameter) in trained:
            parameter.requires_grad_(True)
        elif id(parameter) not in kept:
            parameter.requires_grad_(False)
