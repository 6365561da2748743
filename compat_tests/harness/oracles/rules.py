"""The server rule of each strategy, written out from its definition, in float64.

Neither Flower nor vectorised shortcuts are used: distances pair by pair, medians by sorting.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.oracles.clipping_rules import (
    ClientAdaptiveRule,
    ClientFixedRule,
    ServerAdaptiveRule,
    ServerFixedRule,
)
from harness.oracles.replies import PlainReply, Rule, State, mean
from harness.oracles.robust_rules import BulyanRule, MedianRule, MultiKrumRule, TrimmedRule

__all__ = ["RULES", "FedAdamRule", "FedAvgRule"]


class FedAvgRule(Rule):
    """The mean, weighted by examples."""

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        return mean(replies)


@dataclass
class FedAvgMRule(Rule):
    """d = x - mean, v = momentum v + d (v = d at first), x' = x - rate v."""

    server_learning_rate: float
    server_momentum: float
    v: State = field(default_factory=dict)

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        average = mean(replies)
        new = {}
        for key, x in current.items():
            self.v[key] = self.server_momentum * self.v.get(key, 0.0) + (x - average[key])
            new[key] = x - self.server_learning_rate * self.v[key]
        return new


@dataclass
class AdaptiveRule(Rule):
    """Flower's family of FedOpt: d = mean - x, and from zero

    m = b1 m + (1 - b1) d,  v = ``second(v, d²)``,
    x' = x + ``rate(round)`` m / (sqrt(v) + tau)

    so tau stands outside the root.
    """

    eta: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    m: State = field(default_factory=dict)
    v: State = field(default_factory=dict)

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the next second moment."""

    def rate(self, server_round: int) -> float:
        """Return the step size of a round; the first is 1."""
        return self.eta

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        average = mean(replies)
        new = {}
        for key, x in current.items():
            d = average[key] - x
            zero = torch.zeros_like(d)
            self.m[key] = self.beta_1 * self.m.get(key, zero) + (1 - self.beta_1) * d
            self.v[key] = self.second(self.v.get(key, zero), d**2)
            new[key] = x + self.rate(server_round) * self.m[key] / (self.v[key].sqrt() + self.tau)
        return new


@dataclass
class FedAdamRule(AdaptiveRule):
    """v = b2 v + (1 - b2) d², rate eta sqrt(1 - b2^t) / (1 - b1^t) with t = round + 1.

    So the correction counts one round more than have happened.
    """

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta_2 * v + (1 - self.beta_2) * square

    def rate(self, server_round: int) -> float:
        t = server_round + 1
        rate: float = self.eta * (1 - self.beta_2**t) ** 0.5 / (1 - self.beta_1**t)
        return rate


@dataclass
class FedYogiRule(AdaptiveRule):
    """v = v - (1 - b2) d² sign(v - d²), without a correction."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta_2) * square * (v - square).sign()


@dataclass
class FedAdagradRule(AdaptiveRule):
    """v = v + d², without momentum."""

    beta_1: float = 0.0

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


@dataclass
class QFedAvgRule(Rule):
    """With L = 1/rate, F_k the client's training loss, and g_k = L (x - y_k):

    x' = x - sum F_k^q g_k / sum (q F_k^(q-1) |g_k|² + L F_k^q)

    where |g|² goes over all tensors. Examples do not count.
    """

    client_learning_rate: float
    q: float

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        steps = 1 / self.client_learning_rate
        total = {key: torch.zeros_like(x) for key, x in current.items()}
        divisor = 0.0
        for reply in replies:
            loss = reply.loss + 1e-10
            squares = 0.0
            for key, x in current.items():
                gradient = steps * (x - reply.state[key])
                total[key] += loss**self.q * gradient
                squares += float((gradient**2).sum())
            divisor += self.q * loss ** (self.q - 1) * squares + steps * loss**self.q
        return {key: x - total[key] / divisor for key, x in current.items()}


RULES: Mapping[str, Callable[..., Rule]] = {
    "fedavg": FedAvgRule,
    "fedavgm": FedAvgMRule,
    "fedadagrad": FedAdagradRule,
    "fedadam": FedAdamRule,
    "fedyogi": FedYogiRule,
    "fedmedian": MedianRule,
    "fedtrimmedavg": TrimmedRule,
    "krum": MultiKrumRule,
    "multikrum": MultiKrumRule,
    "bulyan": BulyanRule,
    "qfedavg": QFedAvgRule,
    "serverfixed": ServerFixedRule,
    "serveradaptive": ServerAdaptiveRule,
    "clientfixed": ClientFixedRule,
    "clientadaptive": ClientAdaptiveRule,
}
