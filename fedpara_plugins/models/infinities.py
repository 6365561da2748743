"""Infinities that belong to a model, such as a mask of ``-inf``, and those that are divergence.

What was sent tells them apart: a value is a sign of divergence if it is NaN or infinite and was
something else in what its sender started from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.support.values import has_values, infinite, nonfinite

__all__ = ["check_finite", "diverged", "infinite_tensors", "restore_infinities"]


def diverged(value: Tensor, before: Tensor | None = None) -> int:
    """Return how many values of a tensor became NaN or infinite.

    Args:
        value: the tensor now.
        before: the same tensor in what was sent; without one of this shape all such values count.
    """
    if not has_values(value):
        return 0
    bad = nonfinite(value)
    if bad.any() and before is not None and before.shape == value.shape and has_values(before):
        old = before.detach().to(value.device, value.dtype)
        # A value that cannot be compared with itself is NaN: what was NaN may stay NaN.
        same = (old == value) | ((old != old) & (value != value))
        bad &= ~same
    return int(bad.sum())


def check_finite(tensors: Mapping[str, Tensor], sent: Mapping[str, Tensor] | None = None) -> None:
    """Raise for the first tensor with values that became NaN or infinite.

    Args:
        tensors: an answer, by name.
        sent: what the answer started from: the state that was sent, or the model's own at the
            start.

    Raises:
        PayloadError: names the tensor, counts the values, and says what to do.
    """
    for name, value in tensors.items():
        count = diverged(value, (sent or {}).get(name))
        if count:
            raise PayloadError(
                f"fedpara: tensor {name!r} holds {count} NaN or infinite values of "
                f"{value.numel()} that it did not hold when it was sent: training has diverged. "
                f"Lower the rate, or set the fedpara option clip = 1.0 (with local='dense' clip "
                f"gradients in your own training). If the values are meant, such as those of a "
                f"mask that is computed in training, keep them out of the state: "
                f"register_buffer(..., persistent=False)"
            )


def restore_infinities(
    tensors: Mapping[str, Tensor], origin: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors with the infinities of the model that they began with.

    Means and differences of equal infinities are NaN for many server optimizers, so that a mask
    would be lost in the first round.

    Args:
        tensors: a new state, by name.
        origin: the state that the run began with.
    """
    restored = dict(tensors)
    for name, value in tensors.items():
        first = origin.get(name)
        if first is None or first.shape != value.shape or not has_values(first):
            continue
        places = infinite(first)
        if places.any():
            first = first.detach().to(value.device, value.dtype)
            restored[name] = torch.where(places.to(value.device), first, value)
    return restored


def infinite_tensors(model: nn.Module) -> dict[str, int]:
    """Return the number of infinities of each tensor of a model's state that holds some."""
    # Quantised layers put other things than tensors into their state.
    state = {n: v for n, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    counts = {n: int(infinite(value).sum()) for n, value in state.items() if has_values(value)}
    return {name: count for name, count in counts.items() if count}
