"""A server's rounds under the guard, and its log lines about clients, for every adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fedpara_plugins.optimizers.contributions import ChangeOutcome
from fedpara_plugins.optimizers.guard import Guard, NormHistory

__all__ = ["GuardedRounds", "log_outcome"]


class GuardedRounds:
    """The guard's decision for each round, and its memory of the rounds before.

    Args:
        guard: its options; None for the published algorithm, without a guard.
        name: the algorithm's name in the log.
        log: the adapter's logger.
    """

    def __init__(self, guard: Guard | None, name: str, log: logging.Logger) -> None:
        self.guard = guard
        self._name = name
        self._log = log
        self._norms = None if guard is None else NormHistory(guard)
        self._collected = 0

    def begin(self, *, clients: int, a_round: int) -> tuple[bool, float | None]:
        """Start a round.

        Args:
            clients: how many there are in all.
            a_round: how many are asked in this round.

        Returns:
            Whether variates are used (otherwise they are only collected), and the bound on an
            update's norm; None if there is no bound yet.
        """
        if self.guard is None or self._norms is None:
            return True, None
        number = self._collected + 1
        collects = a_round > 0 and self.guard.collecting(number, clients=clients, a_round=a_round)
        self._collected += collects
        if collects:
            self._log.info(
                "fedpara: %s: the guard only collects in this round (%d so far)",
                self._name, self._collected,
            )  # fmt: skip
        return not collects, self._norms.bound()

    def note(self, norms: Mapping[str, float], kept: Mapping[str, float]) -> None:
        """Add a round's updates, and log which of them the guard has bounded.

        Args:
            norms: norms of the updates as they counted, by the client's name in the log.
            kept: for each client, the share of its update that counted; 1 for all of it.
        """
        if self._norms is None:
            return
        self._norms.add(norms.values())
        bounded = [f"{who} to {share:.0%}" for who, share in kept.items() if share < 1.0]
        if bounded:
            self._log.info(
                "fedpara: %s: the guard bounded %d of %d updates: %s",
                self._name, len(bounded), len(norms), ", ".join(bounded[:5]),
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the last norms, and the number of rounds that only collected."""
        return {
            "norms": [] if self._norms is None else list(self._norms.last),
            "collected": self._collected,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; other entries of the state are ignored."""
        if self._norms is not None:
            self._norms.last.clear()
            self._norms.add(state["norms"])
        self._collected = int(state["collected"])


def log_outcome(
    log: logging.Logger,
    name: str,
    outcome: ChangeOutcome,
    who: str,
    since: int,
    *,
    exactly: bool = False,
) -> None:
    """Log a client's change if its state was lost or stale.

    Args:
        log: the adapter's logger.
        name: the algorithm's name.
        outcome: what `Contributions.take` returned.
        who: the client's name in the log.
        since: the round of the state that the client started from.
        exactly: whether the server knew the share of a client that lost its state.
    """
    if outcome == "lost":
        log.warning(
            "fedpara: %s: %s had lost its state and starts from zero; its old share was taken out "
            "of the sum %s",
            name, who, "exactly" if exactly else "by the clients' mean",
        )  # fmt: skip
    elif outcome == "stale":
        log.warning(
            "fedpara: %s: %s started from its state of round %d, which is not the one in the sum; "
            "its model counts, its state does not, and is put right next time",
            name, who, since,
        )  # fmt: skip
