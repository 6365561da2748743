"""FedDyn as a Flower strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedpara_plugins.optimizers import FedDynServer, Guard, State, Weighting, check_alpha
from fedpara_plugins_flower.messages.drift_records import Task
from fedpara_plugins_flower.strategies.base import Answer, DriftStrategy

__all__ = ["FedDyn"]


class FedDyn(DriftStrategy):
    """FedDyn (Acar et al. 2021, arXiv 2111.04263, algorithm 1).

    The clients' train function needs ``fedpara.correction``, see there. Messages carry nothing
    beside the model.

    Args:
        alpha: weight of the quadratic term; the server's extra step is the duals' mean by alpha.
        weighting: ``uniform``, as published: every client counts the same, in the model and in
            h; ``examples``: by its ``num-examples``, as FedAvg does it.
        guard: bounds updates and with them duals; None for the published algorithm.
        clients: m, how many there are in all; None for those that are connected or have ever
            answered.
        remember: keep every client's dual on the server too, so that a lost one is taken out of
            h exactly.
        options: of FedAvg: ``fraction_train``, ``min_train_nodes``, ``weighted_by_key``, ...
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

    def task(self, **common: Any) -> Task:
        """Alpha, bound, and whether to correct."""
        return Task(self.algorithm, alpha=self.alpha, **common)

    def variate(self) -> State:
        """Nothing: the clients need not know h."""
        return {}

    def next_x(self, answers: Sequence[Answer], server_round: int) -> State:
        """The clients' mean minus h / alpha."""
        for answer in answers:
            received = self.received_by(answer.node)
            self.take(answer, self.server.change(received, answer.reply), server_round)
        return self.server.step(
            self._x,
            [answer.reply for answer in answers],
            clients=self.clients,
            correct=self._correct,
        )
