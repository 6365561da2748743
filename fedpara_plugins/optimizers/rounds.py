"""The result of a client's round, and the server's average of several clients' models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.optimizers.named_tensors import State

__all__ = ["ClientUpdate", "LocalResult", "Weighting", "client_weights", "next_state"]

Weighting = Literal["uniform", "examples"]


@dataclass(frozen=True)
class LocalResult:
    """The result of a client's round.

    Attributes:
        own: the client's variate or dual after the round, on the CPU; None if the round gave NaN or
            infinity and must not count.
        change: the variate or dual minus its value before the round.
        norm: norm of the shared parameters' update, before any bound.
        kept: the share of the update that counts: 1 unless a bound was exceeded, 0 for NaN.
        steps: number of optimizer steps.
    """

    own: State | None
    change: State
    norm: float
    kept: float
    steps: int


@dataclass(frozen=True)
class ClientUpdate:
    """One client's reply, as a server uses it.

    Attributes:
        arrays: the client's model.
        names: those of its names that have a variate or dual.
        examples: the client's number of examples.
    """

    arrays: Mapping[str, Tensor]
    names: frozenset[str]
    examples: float = 1.0


def client_weights(replies: Sequence[ClientUpdate], weighting: Weighting) -> list[float]:
    """Return the replies' weights, which sum to 1.

    Raises:
        ConfigError: a client reports no examples.
    """
    raw = [reply.examples if weighting == "examples" else 1.0 for reply in replies]
    if not all(weight > 0 for weight in raw):
        raise ConfigError(
            f"weighting 'examples' needs a positive number of examples from every client, got {raw}"
        )
    return [weight / sum(raw) for weight in raw]


def next_state(
    x: Mapping[str, Tensor],
    replies: Sequence[ClientUpdate],
    *,
    weighting: Weighting,
    then: Callable[[Tensor, Tensor, str], Tensor],
) -> State:
    """Compute the server's next state in float64, rounded to the dtypes of ``x``.

    Args:
        x: the state that the clients started from.
        replies: at least one.
        weighting: how the clients are weighted.
        then: for the names with a variate or dual, maps a tensor of x and the clients' mean of it
            to its next value. All other tensors become the mean, rounded if they are integers.
    """
    weights = client_weights(replies, weighting)
    names = replies[0].names
    after: State = {}
    for name, old in x.items():
        wide = old.detach().to("cpu", torch.float64)
        parts = (
            w * r.arrays[name].detach().to("cpu", torch.float64)
            for w, r in zip(weights, replies, strict=True)
        )
        mean = sum(parts, torch.zeros_like(wide))
        new = then(wide, mean, name) if name in names else mean
        after[name] = (new if old.is_floating_point() else new.round()).to(old.dtype)
    return after
