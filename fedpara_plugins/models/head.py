"""The classification head that ``private_head`` and ``label_prior`` are about."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import UninitializedParameter

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, ConversionError
from fedpara_plugins.layers.base import full_name
from fedpara_plugins.layers.personal import ADDED, PersonalLinear
from fedpara_plugins.models.private import PrivateTensor, matches

__all__ = ["choose_head", "head_tensors"]

LISTED = 10
"""Number of layers that an error names, counted from the model's end."""


def choose_head(model: nn.Module, config: FedParaConfig, *, private_factors: bool) -> str | None:
    """Return the name of the model's head; None unless ``private_head`` or ``label_prior`` is set.

    Args:
        model: not converted yet.
        config: its options.
        private_factors: whether any weight of the model will have private factors.

    Raises:
        ConfigError: the option ``head`` names no layer, or private steps would train the head
            alone.
        ConversionError: the layer does not suit the options.
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
    if config.private_head and matches(full_name(name, "weight"), config.private):
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
        others = sorted(places - {full_name(name, attribute)})
        if changed and others:
            raise ConversionError(
                f"{_options(config)}: {attribute} of layer {name!r} stands at {', '.join(others)} "
                f"too, and the dense model cannot hold another value in each place. Untie it, or "
                f"name another layer with the option head"
            )


def head_tensors(model: nn.Module) -> dict[str, PrivateTensor]:
    """Return the private parameters of the model's head by full name, for `ModelSpec`."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, PersonalLinear):
            for name, value in layer.added.items():
                dtype = str(value.dtype).removeprefix("torch.")
                target = full_name(path, ADDED[name])
                found[full_name(path, name)] = PrivateTensor(tuple(value.shape), dtype, onto=target)
    return found


def _options(config: FedParaConfig) -> str:
    return " and ".join(n for n in ("private_head", "label_prior") if getattr(config, n))
