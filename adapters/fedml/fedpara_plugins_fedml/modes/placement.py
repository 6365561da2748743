"""The data silos that train in a round, and the process that trains each of them."""

from __future__ import annotations

from collections.abc import Sequence

from fedpara_plugins_fedml.seams import sample_silos

__all__ = ["SiloPlacement"]


class SiloPlacement:
    """The processes to which a run's silos are assigned.

    FedML draws silos from the round's number, and gives the first to the first process, and so on.
    Where silos have state of their own (private factors, an optimizer's state, codec errors), a
    silo stays with the process that had it first; one process may then have two in a round.

    Args:
        total: number of data silos.
        per_round: number of silos that train in a round.
        keep: whether a silo stays with its first process.
    """

    def __init__(self, total: int, per_round: int, *, keep: bool) -> None:
        self._total = total
        self._a_round = per_round
        self._keep = keep
        self._process: dict[int, int] = {}

    def sample(self, number: int) -> list[int]:
        """Return the silos of a round, the first being 0, as FedML draws them."""
        return sample_silos(number, self._total, self._a_round)

    def assign(self, silos: Sequence[int], processes: Sequence[int]) -> dict[int, int]:
        """Return the process for each silo.

        Args:
            silos: of a round.
            processes: all client processes, in the same order in every round.
        """
        if not self._keep:
            self._process |= {silo: processes[i % len(processes)] for i, silo in enumerate(silos)}
            return {silo: self._process[silo] for silo in silos}
        load = dict.fromkeys(processes, 0)
        for silo in silos:
            if self._process.get(silo) in load:
                load[self._process[silo]] += 1
        for silo in silos:
            if self._process.get(silo) not in load:
                self._process[silo] = min(processes, key=lambda each: load[each])
                load[self._process[silo]] += 1
        return {silo: self._process[silo] for silo in silos}

    def assigned_to(self, process: int) -> list[int]:
        """Return the silos that a process had last."""
        return [silo for silo, owner in self._process.items() if owner == process]
