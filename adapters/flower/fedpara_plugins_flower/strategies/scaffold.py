"""SCAFFOLD as a Flower strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import Guard, ScaffoldServer, State, Weighting
from fedpara_plugins_flower.messages.drift_records import ClientTask
from fedpara_plugins_flower.strategies.base import DriftStrategy
from fedpara_plugins_flower.strategies.client_replies import ClientReply

__all__ = ["Guard", "Scaffold"]


class Scaffold(DriftStrategy):
    """SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1).

    The clients' train function needs ``fedpara.correction``.

    Args:
        option: the client's new variate: ``II``, the mean gradient of its steps, or ``I``, the
            gradient at the server's model, which costs a pass over the client's data.
        server_rate: of the step from the model to the clients' mean; 1 takes the mean.
        weighting: ``uniform``, as published: every client counts the same, in the model and in
            c; ``examples``: clients count by their ``num-examples``, as in FedAvg.
        guard: bounds updates and variates, and collects variates before they are used; None for
            the published algorithm.
        clients: N, the number of all clients; None for those that are connected or have ever
            answered.
        remember: whether the server keeps every client's variate too, so that a lost one is
            subtracted from c exactly.
        options: of FedAvg: ``fraction_train``, ``min_train_nodes``, ``weighted_by_key``, ...

    Raises:
        ConfigError: if ``option`` or ``weighting`` is unknown.
    """

    algorithm = "scaffold"
    needs_change = True

    def __init__(
        self,
        *,
        option: Literal["I", "II"] = "II",
        server_rate: float = 1.0,
        weighting: Weighting = "uniform",
        guard: Guard | None = Guard(),  # noqa: B008  (frozen)
        clients: int | None = None,
        remember: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            weighting=weighting, guard=guard, clients=clients, remember=remember, **options
        )
        if option not in ("I", "II"):
            raise ConfigError(f"Scaffold: option must be 'I' or 'II', got {option!r}")
        self.option = option
        self.server = ScaffoldServer(rate=server_rate, weighting=weighting, sums=self.sums)

    def task(self, **common: Any) -> ClientTask:
        """Return the option, the bound, and whether to correct."""
        return ClientTask(self.algorithm, option=self.option, **common)

    def variate(self) -> State:
        """Return c; nothing while it is zero, before any client has answered."""
        return self.server.variate(self.clients, self._x)

    def next_x(self, replies: Sequence[ClientReply], server_round: int) -> State:
        """Return the model after a step towards the clients' mean; c becomes the variates' mean."""
        for reply in replies:
            self.add_change(reply, reply.change, server_round)
        return self.server.step(self._x, [reply.reply for reply in replies])
