"""The classification layer: which one it is, and a client's label counts in its logits.

A client that has seen classes with frequencies n_k / n adds log((n_k + 0.1) / (n + 1)) to its
logits, in training and in prediction. The shared layers then need not learn, and forget each round,
how often a class occurs at whom.
"""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.parameter import UninitializedParameter

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, ConversionError
from fedpara_plugins.layers.personal import ADDED, PersonalLinear
from fedpara_plugins.models.private import OwnTensor, matches

__all__ = ["added_tensors", "choose_head"]

log = logging.getLogger(__name__)


LISTED = 10
"""How many layers an error names, counted from the model's end."""


# Which layer


def choose_head(model: nn.Module, config: FedParaConfig, *, private_factors: bool) -> str | None:
    """The name of the layer that ``private_head`` and ``label_prior`` are about; None without them.

    Args:
        model: not converted yet.
        config: its options.
        private_factors: whether any weight of the model will have private factors.

    Raises:
        ConfigError: the option ``head`` names no layer, or private steps would train nothing else.
        ConversionError: the layer cannot have what is asked for.
    """
    if not (config.private_head or config.label_prior):
        return None
    if config.private_head and not private_factors:
        raise ConfigError(
            "option 'private_head': the head is corrected in private steps, and no weight of the "
            "model has private factors that would be trained in them; use method='pfedpara', or "
            "private_head=False"
        )
    linear: list[str] = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    known = f"The model's linear layers: {', '.join(linear[-LISTED:]) or 'none'}."
    if config.head and config.head not in dict(model.named_modules()):
        raise ConfigError(f"option 'head': the model has no layer {config.head!r}. {known}")
    if not (config.head or linear):
        raise ConversionError(f"no layer for {_options(config)} found. {known}")
    name = config.head or linear[-1]
    _check_head(model, name, config, known)
    _check_untied(model, name, config)
    return name


def _check_head(model: nn.Module, name: str, config: FedParaConfig, known: str) -> None:
    layer = model.get_submodule(name)
    if type(layer) is not nn.Linear or isinstance(layer.weight, UninitializedParameter):
        raise ConversionError(
            f"{_options(config)}: layer {name!r} is a {type(layer).__name__}, expected exactly "
            f"nn.Linear. Name another with the option head. {known}"
        )
    if config.label_prior and layer.bias is None:
        raise ConversionError(
            f"label_prior: layer {name!r} has no bias, so the dense model has no place for the "
            f"label counts. Build it with bias=True, name another layer with the option head, or "
            f"set label_prior=False"
        )
    if config.label_prior and layer.out_features < 2:
        raise ConversionError(
            f"label_prior: layer {name!r} has one output, and label counts need one per class. "
            f"Name another layer with the option head, or set label_prior=False"
        )
    if config.private_head and matches(f"{name}.weight".strip("."), config.private):
        raise ConfigError(
            f"option 'private_head': the whole of layer {name!r} is private already, by the option "
            f"private; leave it out of that, or set private_head=False"
        )


def _check_untied(model: nn.Module, name: str, config: FedParaConfig) -> None:
    layer = model.get_submodule(name)
    for attribute, changed in (("weight", config.private_head), ("bias", config.label_prior)):
        places = {
            other
            for other, parameter in model.named_parameters(remove_duplicate=False)
            if parameter is getattr(layer, attribute)
        }
        others = sorted(places - {f"{name}.{attribute}".strip(".")})
        if changed and others:
            raise ConversionError(
                f"{_options(config)}: {attribute} of layer {name!r} stands at {', '.join(others)} "
                f"too, and the dense model cannot hold another value in each place. Untie it, or "
                f"name another layer with the option head"
            )


def added_tensors(model: nn.Module) -> dict[str, OwnTensor]:
    """The private parts of the model's head by full name, as `ModelSpec` describes them."""
    found = {}
    for prefix, layer in model.named_modules():
        if isinstance(layer, PersonalLinear):
            path = f"{prefix}." if prefix else ""
            for name, value in layer.added.items():
                dtype = str(value.dtype).removeprefix("torch.")
                found[path + name] = OwnTensor(tuple(value.shape), dtype, onto=path + ADDED[name])
    return found


def _options(config: FedParaConfig) -> str:
    return " and ".join(n for n in ("private_head", "label_prior") if getattr(config, n))


# Label counts
