"""The classification layer: which one it is, and a client's label counts in its logits.

A client that has seen classes with frequencies n_k / n adds log((n_k + 0.1) / (n + 1)) to its
logits, in training and in prediction. The shared layers then need not learn, and forget each round,
how often a class occurs at whom.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, ConversionError
from fedpara_plugins.layers.personal import ADDED, PersonalLinear
from fedpara_plugins.own_state import OwnTensor, matches

__all__ = ["added_tensors", "choose_head", "set_label_counts", "warn_without_counts"]

log = logging.getLogger(__name__)

UNSEEN = 0.1
"""What every class is counted more often than it occurs, so that no logit is minus infinity."""

LISTED = 10
"""How many layers an error names, counted from the model's end."""

_warned: set[str] = set()


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


def set_label_counts(
    model: nn.Module,
    labels: Tensor | Iterable[Any] | None = None,
    *,
    counts: Tensor | Iterable[Any] | None = None,
) -> None:
    """Tell a client's model how often each class occurs in the client's training data.

    Call it on the client, after the model has loaded its state and before training. The counts
    stay in the client's private state from then on, and never enter a message. On a model without
    the option ``label_prior`` nothing happens, so that the line can stay when options change.

    Args:
        model: converted, or not.
        labels: class index of every training example, shape (n,), integers.
        counts: instead of labels, how often each class occurs, shape (classes,).

    Raises:
        ConfigError: labels that are no class indices, a wrong number of counts, or none at all.

    Example:
        >>> model = convert(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)),
        ...                 method="pfedpara", label_prior=True)
        >>> set_label_counts(model, [0, 0, 2, 0])
        >>> model[2].label_prior
        Parameter containing:
        tensor([-0.4780, -3.9120, -1.5141])
    """
    for layer in model.modules():
        if isinstance(layer, PersonalLinear) and "label_prior" in layer.added:
            found = _counted(labels, counts, layer.out_features)
            prior = torch.log((found + UNSEEN) / (found.sum() + 1))
            with torch.no_grad():
                layer.added["label_prior"].copy_(prior)
            if layer.progress is not None:
                layer.progress.counts_given = True


def warn_without_counts(layers: Iterable[nn.Module], *, given: bool) -> None:
    """Say once that training begins without label counts.

    Args:
        layers: of one model.
        given: whether there were counts, before a state was loaded.
    """
    for layer in layers:
        prior = layer.added.get("label_prior") if isinstance(layer, PersonalLinear) else None
        # No counts give exactly zero for any class.
        if prior is None or "counts" in _warned or bool(prior.any()):
            continue
        _warned.add("counts")
        log.warning(
            "fedpara: label_prior is on, and training begins without label counts%s: call "
            "set_label_counts(model, labels) with the client's training labels, after the model "
            "has loaded its state and before training",
            " (a state that was loaded later has overwritten them)" if given else "",
        )


def _counted(labels: Any, counts: Any, classes: int) -> Tensor:
    if (labels is None) == (counts is None):
        raise ConfigError("set_label_counts: expected either labels or counts")
    if counts is not None:
        return _checked_counts(_as_tensor(counts, "counts"), classes)
    values = _as_tensor(labels, "labels")
    if values.numel() == 0:
        raise ConfigError("set_label_counts: there are no labels; expected one per example")
    if values.ndim != 1 or values.is_floating_point() or values.is_complex():
        raise ConfigError(
            f"set_label_counts: expected one integer class index per example, shape (n,), got "
            f"{values.dtype} of shape {tuple(values.shape)}; of one-hot rows take argmax(1)"
        )
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ConfigError(
            f"set_label_counts: label {wrong} is out of range: the layer has {classes} outputs, "
            f"expected 0 to {classes - 1}. If this layer gives no class scores, name the one that "
            f"does with the option head"
        )
    return torch.bincount(values.long(), minlength=classes).double()


def _checked_counts(counts: Tensor, classes: int) -> Tensor:
    if counts.shape != (classes,):
        raise ConfigError(
            f"set_label_counts: expected {classes} counts, one per output of the layer, got shape "
            f"{tuple(counts.shape)}"
        )
    counts = counts.double()
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()) or not counts.any():
        raise ConfigError(
            f"set_label_counts: expected counts of 0 or more, some above 0, got {counts.tolist()}"
        )
    return counts


def _as_tensor(values: Any, what: str) -> Tensor:
    if not isinstance(values, Tensor) and not hasattr(values, "__array__"):
        values = list(values) if isinstance(values, Iterable) else values
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"set_label_counts: {what} are no numbers: {error}") from error
