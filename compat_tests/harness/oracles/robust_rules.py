"""Strategies that tolerate some malicious clients, by brute force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.oracles.replies import PlainReply, Rule, State, mean

__all__ = ["BulyanRule", "MedianRule", "MultiKrumRule", "TrimmedRule"]


class MedianRule(Rule):
    """Coordinate by coordinate the median; the mean of the middle two of an even number."""

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        return {key: _median(_ranked(replies, key)) for key in current}


@dataclass
class TrimmedRule(Rule):
    """Coordinate by coordinate the plain mean without the beta n smallest and largest values."""

    beta: float

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        cut = int(self.beta * len(replies))
        new = {}
        for key in current:
            ranked = _ranked(replies, key)
            new[key] = ranked[cut : len(ranked) - cut].mean(dim=0)
        return new


@dataclass
class MultiKrumRule(Rule):
    """The mean, weighted by examples, of the clients that stand closest to the others.

    A client's score is the sum of its squared distances to the n - f - 2 clients next to it; the
    lowest scores are taken.
    """

    num_malicious_nodes: int
    num_nodes_to_select: int = 1

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        return mean(_closest(replies, self.num_malicious_nodes, self.num_nodes_to_select))


@dataclass
class BulyanRule(Rule):
    """Of the n - 2f clients that Multi-Krum selects: coordinate by coordinate the plain mean of the
    n - 4f values closest to their median.
    """

    num_malicious_nodes: int

    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        f = self.num_malicious_nodes
        selected = _closest(replies, f, len(replies) - 2 * f)
        new = {}
        for key in current:
            ranked = _ranked(selected, key)
            order = (ranked - _median(ranked)).abs().argsort(dim=0)
            near = ranked.gather(0, order[: len(replies) - 4 * f])
            new[key] = near.mean(dim=0)
        return new


def _closest(replies: Sequence[PlainReply], f: int, count: int) -> list[PlainReply]:
    scores = []
    for one in replies:
        others = sorted(_distance(one, other) for other in replies if other is not one)
        scores.append(sum(others[: len(replies) - f - 2]))
    order = sorted(range(len(replies)), key=lambda index: scores[index])
    return [replies[index] for index in order[:count]]


def _distance(a: PlainReply, b: PlainReply) -> float:
    return float(sum(((a.state[key] - b.state[key]) ** 2).sum() for key in a.state))


def _ranked(replies: Sequence[PlainReply], key: str) -> Tensor:
    """Sort the clients' values of a tensor coordinate by coordinate. [clients, ...]"""
    return torch.stack([reply.state[key] for reply in replies]).sort(dim=0).values


def _median(ranked: Tensor) -> Tensor:
    half = len(ranked) // 2
    return ranked[half] if len(ranked) % 2 else (ranked[half - 1] + ranked[half]) / 2
