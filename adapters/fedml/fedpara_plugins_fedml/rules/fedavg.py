"""FedAvg (McMahan et al. 2017, arXiv 1602.05629): the clients' mean, weighted by examples."""

from __future__ import annotations

from collections.abc import Sequence

from fedpara_plugins_fedml.rules.base import ClientReply, Mean, Rule, State

__all__ = ["FedAvg"]


class FedAvg(Rule):
    """The server's part; clients need none."""

    name = "FedAvg"
    differs = "FedML lets the clients of the first round train on each other's result"

    def step(self, x: State, replies: Sequence[ClientReply], mean: Mean) -> State:
        """Return the mean of the replies."""
        return mean(replies)
