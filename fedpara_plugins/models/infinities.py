"""Infinities that belong to a model, such as a mask of ``-inf``, and those that are divergence.

What was sent tells them apart: a value is a sign of divergence if it is NaN or infinite and was
something else in what its sender started from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.support.values import has_values, infinite, nonfinite

__all__ = [
    "OwnInfinities",
    "check_finite",
    "diverged",
    "infinite_tensors",
    "remedy_for",
    "restore_infinities",
    "without_nan",
]


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


def remedy_for(config: FedParaConfig | None = None) -> str:
    """Return what to do about a training that diverged.

    Args:
        config: of the side that trained; None if it is not known.
    """
    if config is not None and (config.local == "dense" or config.method == "none"):
        return "Lower the learning rate, or clip gradients in your own training loop"
    if config is not None and config.clip is not None:
        return f"Lower the learning rate, or the fedpara option clip, which is {config.clip}"
    where = "" if config is not None else " where none is set"
    return f"Lower the learning rate, or set the fedpara option clip = relative{where}"


def check_finite(
    tensors: Mapping[str, Tensor],
    sent: Mapping[str, Tensor] | None = None,
    *,
    config: FedParaConfig | None = None,
) -> None:
    """Raise for the first tensor with values that became NaN or infinite.

    Args:
        tensors: an answer, by name.
        sent: what the answer started from: the state that was sent, or the model's own at the
            start.
        config: of the side that trained, whose options decide what helps; None if not known.

    Raises:
        PayloadError: names the tensor, counts the values, and says what to do.
    """
    for name, value in tensors.items():
        count = diverged(value, (sent or {}).get(name))
        if count:
            raise PayloadError(
                f"fedpara: tensor {name!r} holds {count} NaN or infinite values of "
                f"{value.numel()} that it did not hold when it was sent: training has diverged. "
                f"{remedy_for(config)}. If the values are meant, such as those of a mask that is "
                f"computed in training, keep them out of the state: "
                f"register_buffer(..., persistent=False)"
            )


def restore_infinities(
    tensors: Mapping[str, Tensor], origin: Mapping[str, Tensor], *, only_nan: bool = False
) -> dict[str, Tensor]:
    """Return tensors with the infinities of the model that they began with.

    Means and differences of equal infinities are NaN for many server optimizers, so that a mask
    would be lost in the first round.

    Args:
        tensors: a new state, by name.
        origin: the state that the run began with.
        only_nan: leave what is not NaN as it is: a server may have unmasked a place on purpose.
    """
    restored = dict(tensors)
    for name, value in tensors.items():
        first = origin.get(name)
        if first is None or first.shape != value.shape or not has_values(first):
            continue
        places = infinite(first).to(value.device)
        if only_nan and places.any():
            places &= value != value  # what cannot be compared with itself is NaN
        if places.any():
            first = first.detach().to(value.device, value.dtype)
            restored[name] = torch.where(places, first, value)
    return restored


def without_nan(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state to compare with where nothing was sent: its infinities are a model's own."""
    return {
        name: torch.where(torch.isnan(value), torch.zeros_like(value), value)
        for name, value in tensors.items()
        if has_values(value) and value.element_size() > 1
    }


class OwnInfinities:
    """The infinities that a run's states began with, in place of the NaN that servers compute."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[torch.Size, Tensor | None]] = {}

    def restored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors with the infinities that they began with.

        What is seen under a name for the first time, or in another shape, begins.

        Raises:
            PayloadError: others became NaN or infinite.
        """
        for name, value in tensors.items():
            if self._first.get(name, (None,))[0] != value.shape:
                own = has_values(value) and bool(nonfinite(value).any())
                self._first[name] = (value.shape, value.detach().clone() if own else None)
        first = {name: own for name, (_, own) in self._first.items() if own is not None}
        found = restore_infinities(tensors, first, only_nan=True)
        for name, value in found.items():
            if count := diverged(value, first.get(name)):
                raise PayloadError(
                    f"the server's next model holds {count} NaN or infinite values of "
                    f"{value.numel()} in {name!r} that it did not hold at first: the strategy has "
                    f"diverged. Lower its server-side learning rate, or the clients'"
                )
        return found


def infinite_tensors(model: nn.Module) -> dict[str, int]:
    """Return the number of infinities of each tensor of a model's state that holds some."""
    # Quantised layers put other things than tensors into their state.
    state = {n: v for n, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    counts = {n: int(infinite(value).sum()) for n, value in state.items() if has_values(value)}
    return {name: count for name, count in counts.items() if count}
