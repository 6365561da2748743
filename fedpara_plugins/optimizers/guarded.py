"""A server's rounds under the guard, and what its log says of clients, in every adapter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fedpara_plugins.optimizers.contributions import Verdict
from fedpara_plugins.optimizers.guard import Guard, Norms

__all__ = ["GuardedRounds", "tell_verdict"]


class GuardedRounds:
    """Decides what the guard asks of each round, and remembers what came of it.

    Args:
        guard: its options; None for the published algorithm, in which it asks nothing.
        name: of the algorithm, for the log.
        log: the adapter's.
    """

    def __init__(self, guard: Guard | None, name: str, log: logging.Logger) -> None:
        self.guard = guard
        self._name = name
        self._log = log
        self._norms = None if guard is None else Norms(guard)
        self._collected = 0

    def begin(self, *, clients: int, a_round: int) -> tuple[bool, float | None]:
        """Start a round.

        Args:
            clients: how many there are in all.
            a_round: how many are asked in this round.

        Returns:
            Whether variates act (otherwise they are only collected), and the bound of an update's
            norm, if there is one yet.
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
        """Take in the updates of a round, and log which of them the guard has bounded.

        Args:
            norms: of the updates as they counted, by the client's name in the log.
            kept: what of each counted, 1 for the whole.
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
        """The last norms, and how many rounds have collected."""
        return {
            "norms": [] if self._norms is None else list(self._norms.last),
            "collected": self._collected,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`; what else the state holds is left alone."""
        if self._norms is not None:
            self._norms.last.clear()
            self._norms.add(state["norms"])
        self._collected = int(state["collected"])


def tell_verdict(
    log: logging.Logger, name: str, verdict: Verdict, who: str, since: int, *, exactly: bool = False
) -> None:
    """Log what was out of the ordinary about a client's state.

    Args:
        log: the adapter's.
        name: of the algorithm.
        verdict: see `Contributions.take`.
        who: the client.
        since: the round of the state that it started from.
        exactly: whether the server knew the share of a client that lost its state.
    """
    if verdict == "lost":
        log.warning(
            "fedpara: %s: %s had lost its state and starts from zero; its old share was taken out "
            "of the sum %s",
            name, who, "exactly" if exactly else "by the clients' mean",
        )  # fmt: skip
    elif verdict == "stale":
        log.warning(
            "fedpara: %s: %s started from its state of round %d, which is not the one in the sum; "
            "its model counts, its state does not, and is put right next time",
            name, who, since,
        )  # fmt: skip
