"""The guard, which keeps SCAFFOLD's variates and FedDyn's duals from growing on their own.

A client's variate is the mean gradient on a path that the variate itself has bent. Where it pushes
a client up its own loss, the gradient is larger, then the next variate is larger, and so on. This
happens on dense models too, and sooner on factors. The guard bounds a client's update relative to
the usual size of updates, and lets the server collect variates before it uses them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from fedpara_plugins.errors import ConfigError

__all__ = ["Guard", "NormHistory", "share_kept"]


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Options of the bound on a client's update and on the variate or dual derived from it.

    Attributes:
        tau: bound on an update's norm, relative to the median norm of the last updates.
        window: number of updates, of all clients, that the median is taken over.
        collect: number of rounds at the start in which variates are collected but not used; None
            for one pass over the clients, ceil(clients / clients per round).

    Raises:
        ConfigError: a value out of range.
    """

    tau: float = 1.5
    window: int = 50
    collect: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ConfigError(f"guard: tau must be a positive number, got {self.tau!r}")
        if self.window < 1:
            raise ConfigError(f"guard: window must be 1 or more, got {self.window!r}")
        if self.collect is not None and self.collect < 0:
            raise ConfigError(f"guard: collect must be 0 or more rounds, got {self.collect!r}")

    def collecting(self, server_round: int, *, clients: int, a_round: int) -> bool:
        """Return whether variates are only collected in this round.

        Args:
            server_round: 1 for the first.
            clients: how many there are in all.
            a_round: how many take part in a round.
        """
        one_pass = math.ceil(clients / max(a_round, 1))
        return server_round <= (one_pass if self.collect is None else self.collect)


@dataclass
class NormHistory:
    """The norms of the last updates, as they counted, and the bound that follows from them.

    Attributes:
        guard: the bound's options.
        last: the norms, oldest first.
    """

    guard: Guard
    last: deque[float] = field(default_factory=deque)

    def add(self, norms: Iterable[float]) -> None:
        """Add the norms of a round's updates, as they counted."""
        self.last.extend(norms)
        while len(self.last) > self.guard.window:
            self.last.popleft()

    def bound(self) -> float | None:
        """Return tau times the median; None before the first update."""
        return self.guard.tau * median(self.last) if self.last else None


def share_kept(norm: float, bound: float | None) -> float:
    """Return the share of an update that counts: 1 within the bound, bound / norm beyond it."""
    return 1.0 if bound is None or norm <= bound else bound / norm
