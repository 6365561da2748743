"""FedDyn as a Flower strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedpara_plugins.optimizers import FedDynServer, Guard, State, Weighting, check_alpha
from fedpara_plugins_flower.messages.drift_records import ClientTask
from fedpara_plugins_flower.strategies.base import DriftStrategy
from fedpara_plugins_flower.strategies.client_replies import ClientReply

__all__ = ["FedDyn"]


class FedDyn(DriftStrategy):
    """FedDyn (Acar et al. 2021, arXiv 2111.04263, algorithm 1).

    The clients' train function needs ``fedpara.correction``. Messages contain no further arrays
    besides the model.

    Args:
        alpha: weight of the quadratic term; the server's extra step is the duals' mean divided by
            alpha.
        weighting: ``uniform``, as published: every client counts the same, in the model and in
            h; ``examples``: clients count by their ``num-examples``, as in FedAvg.
        guard: bounds updates and thereby duals; None for the published algorithm.
        clients: m, the number of all clients; None for those that are connected or have ever
            answered.
        remember: whether the server keeps every client's dual too, so that a lost one is subtracted
            from h exactly.
        options: of FedAvg: ``fraction_train``, ``min_train_nodes``, ``weighted_by_key``, ...

    Raises:
        ConfigError: if alpha is not positive, or ``weighting`` is unknown.
    """

    algorithm = "feddyn"

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        weighting: Weighting = "uniform",
        guard: Guard | None = None,
        clients: int | None = None,
        remember: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            weighting=weighting, guard=guard, clients=clients, remember=remember, **options
        )
        self.alpha = check_alpha(alpha)
        self.server = FedDynServer(alpha=alpha, weighting=weighting, sums=self.sums)

    def task(self, **common: Any) -> ClientTask:
        """Return alpha, the bound, and whether to correct."""
        return ClientTask(self.algorithm, alpha=self.alpha, **common)

    def variate(self) -> State:
        """Return nothing: clients do not need h."""
        return {}

    def next_x(self, replies: Sequence[ClientReply], server_round: int) -> State:
        """Return the clients' mean minus h / alpha."""
        for reply in replies:
            received = self.received_by(reply.node)
            self.add_change(reply, self.server.change(received, reply.reply), server_round)
        return self.server.step(
            self._x,
            [reply.reply for reply in replies],
            clients=self.clients,
            correct=self._correct,
        )
