"""A client's label counts, which its classification layer adds to the logits.

A client with n_k of n labels in class k adds log((n_k + 0.1) / (n + 1)) to its logits, in training
and in prediction. The shared layers then need not learn each client's class frequencies, only to
forget them in the next round.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.layers.personal import PersonalLinear

__all__ = ["lacks_label_counts", "set_label_counts", "warn_without_counts"]

log = logging.getLogger(__name__)

UNSEEN = 0.1
"""Added to every class's count, so that no logit is minus infinity."""

_warned: set[str] = set()


def set_label_counts(
    model: nn.Module,
    labels: Tensor | Iterable[Any] | None = None,
    *,
    counts: Tensor | Iterable[Any] | None = None,
) -> None:
    """Set how often each class occurs in a client's training data.

    Call it on the client, after the model has loaded its state and before training. The counts
    stay in the client's private state and never enter a message. Without the option
    ``label_prior`` nothing happens, so the call can stay when options change.

    Args:
        model: converted, or not.
        labels: class index of every training example, shape (n,), integers.
        counts: instead of labels, number of examples of each class, shape (classes,).

    Raises:
        ConfigError: labels are no class indices, the number of counts is wrong, or nothing is
            given.

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


def lacks_label_counts(model: nn.Module) -> bool:
    """Return whether the model's head adds label counts to its logits and has none yet.

    No counts give exactly zero for any class, so a prior of zeros has not been set.
    """
    priors = [
        layer.added["label_prior"]
        for layer in model.modules()
        if isinstance(layer, PersonalLinear) and "label_prior" in layer.added
    ]
    return any(not bool(prior.any()) for prior in priors)


def warn_without_counts(layers: Iterable[nn.Module], *, given: bool) -> None:
    """Log one warning per process if training begins without label counts.

    Args:
        layers: the layers of one model.
        given: whether counts were set before a state was loaded.
    """
    for layer in layers:
        prior = layer.added.get("label_prior") if isinstance(layer, PersonalLinear) else None
        if prior is None or "counts" in _warned or bool(prior.any()):  # as in `lacks_label_counts`
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
