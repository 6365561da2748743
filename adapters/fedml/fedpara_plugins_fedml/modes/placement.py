"""Which data silos train in a round, and which process trains each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedml.cross_silo.server.fedml_aggregator import FedMLAggregator

__all__ = ["Silos"]


class Silos:
    """The silos of a run.

    FedML draws them from the round's number, and hands the first to the first process, and so on.
    Where silos keep state of their own (private factors, an optimizer's, what a codec has lost), a
    silo stays with the process that had it first; one process may then have two in a round.

    Args:
        total: number of data silos.
        a_round: how many train in a round.
        keep: whether silos stay where they were.
    """

    def __init__(self, total: int, a_round: int, *, keep: bool) -> None:
        self._total = total
        self._a_round = a_round
        self._keep = keep
        self._homes: dict[int, int] = {}

    def of_round(self, number: int) -> list[int]:
        """The silos of a round, the first being 0, as FedML draws them."""
        drawn: Sequence[Any] = FedMLAggregator.data_silo_selection(
            None, number, self._total, self._a_round
        )
        return [int(index) for index in drawn]

    def homes(self, silos: Sequence[int], processes: Sequence[int]) -> dict[int, int]:
        """The process for each silo.

        Args:
            silos: of a round.
            processes: those that there are, in the same order in every round.
        """
        if not self._keep:
            self._homes |= {silo: processes[i % len(processes)] for i, silo in enumerate(silos)}
            return {silo: self._homes[silo] for silo in silos}
        load = dict.fromkeys(processes, 0)
        for silo in silos:
            if self._homes.get(silo) in load:
                load[self._homes[silo]] += 1
        for silo in silos:
            if self._homes.get(silo) not in load:
                self._homes[silo] = min(processes, key=lambda each: load[each])
                load[self._homes[silo]] += 1
        return {silo: self._homes[silo] for silo in silos}

    def of_process(self, process: int) -> list[int]:
        """The silos that were last at a process."""
        return [silo for silo, home in self._homes.items() if home == process]
