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
        movable: whether every process has the data of all silos, so that others can train those of
            a process that takes no part.
    """

    def __init__(self, total: int, per_round: int, *, keep: bool, movable: bool = False) -> None:
        self.movable = movable
        self._total = total
        self._a_round = per_round
        self._keep = keep
        self._process: dict[int, int] = {}

    def sample(self, number: int) -> list[int]:
        """Return the silos of a round, the first being 0, as FedML draws them."""
        return sample_silos(number, self._total, self._a_round)

    def assign(
        self, silos: Sequence[int], processes: Sequence[int], here: Sequence[int] | None = None
    ) -> dict[int, int]:
        """Return the process for each silo.

        Args:
            silos: of a round.
            processes: all client processes, in the same order in every round.
            here: those of them that take part; None for all. Unless silos are `movable`, a silo may
                belong to another one.
        """
        here = list(processes if here is None else here) or list(processes)
        own = [processes[place % len(processes)] for place in range(len(silos))]
        load = dict.fromkeys(here, 0)
        homeless = []
        for silo, first in zip(silos, own, strict=True):
            home = self._process.get(silo) if self._keep else first
            if home is None or (self.movable and home not in load):
                homeless.append(silo)
                continue
            self._process[silo] = home
            load[home] = load.get(home, 0) + 1
        for silo in homeless:
            self._process[silo] = min(here, key=lambda each: load[each])
            load[self._process[silo]] += 1
        return {silo: self._process[silo] for silo in silos}

    def assigned_to(self, process: int) -> list[int]:
        """Return the silos that a process had last."""
        return [silo for silo, owner in self._process.items() if owner == process]
