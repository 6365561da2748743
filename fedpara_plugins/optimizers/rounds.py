"""What a client's round comes to, and the average that a server makes of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.optimizers.named import State

__all__ = ["LocalResult", "Reply", "Weighting", "client_weights", "next_state"]

Weighting = Literal["uniform", "examples"]


@dataclass(frozen=True)
class LocalResult:
    """What a client's round came to.

    Attributes:
        own: the client's variate or dual after it, on the CPU; None if the round gave NaN or
            infinity and must not count.
        change: the same minus what it was before.
        norm: of the update of the shared parameters, before any bound.
        kept: the share of the update that counts: 1 unless a bound was exceeded, 0 for NaN.
        steps: of optimizers.
    """

    own: State | None
    change: State
    norm: float
    kept: float
    steps: int


@dataclass(frozen=True)
class Reply:
    """What a server has of one client.

    Attributes:
        arrays: the client's model.
        names: those of it that have a variate or dual.
        examples: the client's number of examples.
    """

    arrays: Mapping[str, Tensor]
    names: frozenset[str]
    examples: float = 1.0


def client_weights(replies: Sequence[Reply], weighting: Weighting) -> list[float]:
    """The replies' weights, of sum 1.

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
    replies: Sequence[Reply],
    *,
    weighting: Weighting,
    then: Callable[[Tensor, Tensor, str], Tensor],
) -> State:
    """The server's next state, computed in float64 and rounded to the dtypes of ``x``.

    Args:
        x: the state that the clients started from.
        replies: at least one.
        weighting: of the clients.
        then: from a tensor of x and the clients' mean of it to its next value, for the names with
            a variate or dual; all others become the mean, integers rounded.
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
