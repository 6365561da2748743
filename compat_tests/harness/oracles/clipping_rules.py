"""Flower's DP wrappers: FedAvg on updates that the server or the client clips.

They run without noise, which has tests of its own. An update is u = y - x over all tensors at once;
clipped it is u min(1, c/|u|). Tensors without dimensions count in the norm, but Flower leaves them
as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.oracles.replies import PlainReply, Rule, State, mean

__all__ = ["ClientAdaptiveRule", "ClientFixedRule", "ServerAdaptiveRule", "ServerFixedRule"]


@dataclass
class ServerFixedRule(Rule):
    """The server clips each reply against what it has sent, at a fixed norm."""

    noise_multiplier: float
    clipping_norm: float

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        return mean([_clipped_reply(reply, current, self.clipping_norm) for reply in replies])


@dataclass
class _Adaptive(Rule):
    """c' = c exp(-rate (share of the clients that were clipped - target))."""

    noise_multiplier: float
    initial_clipping_norm: float
    target_clipped_quantile: float
    clip_norm_lr: float

    def __post_init__(self) -> None:
        self.norm = self.initial_clipping_norm
        self.clipped = 0

    def adapt(self, clients: int) -> None:
        """Adapt the norm after a round with this many clients."""
        excess = self.clipped / clients - self.target_clipped_quantile
        self.norm *= math.exp(-self.clip_norm_lr * excess)
        self.clipped = 0


@dataclass
class ServerAdaptiveRule(_Adaptive):
    """The same with a norm that follows the updates, and moves before it is used again."""

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        self.clipped = sum(_norm(current, reply.state) > self.norm for reply in replies)
        new = mean([_clipped_reply(reply, current, self.norm) for reply in replies])
        self.adapt(len(replies))
        return new


@dataclass
class ClientFixedRule(Rule):
    """Each client clips its own update, private part included."""

    noise_multiplier: float
    clipping_norm: float

    def client(self, before: State, after: State) -> State:
        return _clipped(before, after, self.clipping_norm)

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        return mean(replies)


@dataclass
class ClientAdaptiveRule(_Adaptive):
    """The same with a norm that the server sends, and moves by what the clients report."""

    def client(self, before: State, after: State) -> State:
        self.clipped += _norm(before, after) > self.norm
        return _clipped(before, after, self.norm)

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        self.adapt(len(replies))
        return mean(replies)


def _norm(before: State, after: State) -> float:
    return math.sqrt(sum(float(((after[key] - before[key]) ** 2).sum()) for key in after))


def _clipped(before: State, after: State, bound: float) -> State:
    scale = min(1.0, bound / _norm(before, after))
    return {
        key: before[key] + (scale if value.dim() else 1.0) * (value - before[key])
        for key, value in after.items()
    }


def _clipped_reply(reply: PlainReply, current: State, bound: float) -> PlainReply:
    return replace(reply, state=_clipped(current, reply.state, bound))
