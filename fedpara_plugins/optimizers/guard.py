"""Keep SCAFFOLD's variates, and FedDyn's duals, from feeding on themselves.

A client's variate is the mean gradient on a path that the variate itself has bent. Where it pushes
a client up its own loss, the gradient there is larger, the next variate too, and so on: a ratchet,
on dense models as well, sooner on factors. The guard bounds how far one client's round may count,
by what clients' rounds usually come to, and lets variates be collected before they are used.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from fedpara_plugins.errors import ConfigError

__all__ = ["Guard", "Norms", "share_kept"]


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How far a client's update, and what is derived from it, may go.

    Attributes:
        tau: bound of an update's norm, in units of the median norm of the last updates.
        window: how many updates of all clients the median is over.
        collect: rounds at the start in which variates are collected and not yet used; None for
            one pass, ceil(clients / clients a round).

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
        """Whether variates are only collected in this round (the first is 1)."""
        one_pass = math.ceil(clients / max(a_round, 1))
        return server_round <= (one_pass if self.collect is None else self.collect)


@dataclass
class Norms:
    """The norms of the last updates that counted, and the bound that follows.

    Attributes:
        guard: the bound's options.
        last: the norms, oldest first.
    """

    guard: Guard
    last: deque[float] = field(default_factory=deque)

    def add(self, norms: Iterable[float]) -> None:
        """Take in the norms of a round's updates, as they counted."""
        self.last.extend(norms)
        while len(self.last) > self.guard.window:
            self.last.popleft()

    def bound(self) -> float | None:
        """Tau times the median; None before the first update."""
        return self.guard.tau * median(self.last) if self.last else None


def share_kept(norm: float, bound: float | None) -> float:
    """What of an update of that norm counts: 1 within the bound, bound / norm beyond it."""
    return 1.0 if bound is None or norm <= bound else bound / norm
