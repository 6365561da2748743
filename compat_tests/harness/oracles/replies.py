"""Clients' replies and rules of the plain loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PlainReply", "Rule", "State", "mean"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class PlainReply:
    """One client's reply.

    Attributes:
        state: the shared part of its state, float64.
        size: its number of examples.
        loss: the mean of its batches' training losses.
    """

    state: State
    size: int
    loss: float = 0.0


class Rule(ABC):
    """One strategy. Everything is float64."""

    def client(self, before: State, after: State) -> State:
        """Return a client's reply, private part included; by default what it has trained.

        Args:
            before: the state that it started from.
            after: the state that it came to.
        """
        return after

    @abstractmethod
    def server(self, server_round: int, current: State, replies: Sequence[PlainReply]) -> State:
        """Return the next global state, without private names.

        Args:
            server_round: number of the round, from 1 on.
            current: the global state.
            replies: the replies, in the order of the clients.
        """


def mean(replies: Sequence[PlainReply]) -> State:
    """Average the states, weighted by examples."""
    total = sum(reply.size for reply in replies)
    average = {key: torch.zeros_like(value) for key, value in replies[0].state.items()}
    for reply in replies:
        for key in average:
            average[key] += reply.state[key] * (reply.size / total)
    return average
