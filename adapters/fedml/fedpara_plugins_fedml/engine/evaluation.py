"""The server's tests after a round, as FedML's cross-silo server runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedpara_plugins_fedml.seams import FedMLAggregator, note_silos

__all__ = ["ServerEvaluation"]


class ServerEvaluation:
    """Calls ``test_all``, ``test`` and ``assess_contribution`` of the user's aggregator.

    Args:
        args: FedML's.
        device: FedML's.
        dataset: FedML's eight entries.
        aggregator: the user's, or FedML's default.
        clients: number of processes.
    """

    def __init__(
        self, args: Any, device: Any, dataset: Sequence[Any], aggregator: Any, clients: int
    ) -> None:
        total, _, train_global, test_global, sizes, train, test, _ = dataset
        self._fedml = FedMLAggregator(
            train_global, test_global, total, train, test, sizes, clients, device, args, aggregator
        )

    def after(self, number: int, silos: Sequence[int]) -> None:
        """Test the server's model after a round, the first being 0."""
        note_silos(silos)
        self._fedml.test_on_server_for_all_clients(number)
        self._fedml.assess_contribution()
