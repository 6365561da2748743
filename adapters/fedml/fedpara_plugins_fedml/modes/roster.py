"""The client processes of a run: which are there, which are not, and for what reason.

No process ends a run for the others: one that cannot take part, or that is gone, is out until it
comes (again), as long as enough others are left.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.support import printable, shortened
from fedpara_plugins_fedml.logs import log

__all__ = ["Roster"]

LONGEST_REASON = 1000
"""Characters of a reason that are kept; it may be a stranger's text."""


class Roster:
    """Says of each client process whether it takes part.

    Args:
        peers: ids of all client processes.
        needed: number of processes below which the run ends.
    """

    def __init__(self, peers: Sequence[int], needed: int) -> None:
        self._peers = tuple(peers)
        self._needed = needed
        self._sessions: dict[int, str] = {}
        self._out: dict[int, str] = {}
        self._misconfigured: dict[int, str] = {}
        self._without_plugin: set[int] = set()

    @property
    def here(self) -> list[int]:
        """The processes that have come and take part."""
        return [peer for peer in self._peers if peer in self._sessions and peer not in self._out]

    @property
    def awaited(self) -> list[int]:
        """The processes that have not come yet, and are not out."""
        return [peer for peer in self._peers if peer not in {*self._sessions, *self._out}]

    @property
    def out(self) -> dict[int, str]:
        """The processes that take no part, with the reasons."""
        return dict(self._out)

    @property
    def without_plugin(self) -> list[int]:
        """Those of them that run without the plugin."""
        return sorted(self._without_plugin & self._out.keys())

    def has_come(self, peer: int, session: str) -> bool:
        """Take a process in; return whether it was out, or another one had its id before.

        Args:
            peer: its id.
            session: differs for each process that has this id.
        """
        known, was_out = self._sessions.get(peer), peer in self._out
        self._sessions[peer] = session
        self._out.pop(peer, None)
        self._misconfigured.pop(peer, None)
        self._without_plugin.discard(peer)
        return was_out or known not in (None, session)

    def leave_out(
        self, peer: int, reason: str, *, misconfigured: bool = False, without_plugin: bool = False
    ) -> bool:
        """Note that a process takes no part, with a line in the log; return whether it is news.

        Args:
            peer: its id.
            reason: in words.
            misconfigured: whether the reason is one of configuration.
            without_plugin: whether it runs without the plugin, which is one too.

        Raises:
            ConfigError: too few processes are left, and all reasons are of configuration; it gives
                that of the first one.
            FedParaError: too few are left; it gives all reasons.
        """
        if peer in self._out:
            return False
        text = printable(shortened(reason.removeprefix("fedpara: "), LONGEST_REASON))
        self._out[peer] = text
        if misconfigured or without_plugin:
            self._misconfigured[peer] = text
        if without_plugin:
            self._without_plugin.add(peer)
        left = len(self._peers) - len(self._out)
        log.error(
            "fedpara: client %d %s. %d of %d client processes are left",
            peer, text.rstrip("."), left, len(self._peers),
        )  # fmt: skip
        self._check_enough(left)
        return True

    def _check_enough(self, left: int) -> None:
        if left >= self._needed:
            return
        if self._misconfigured.keys() == self._out.keys():
            peer, text = next(iter(self._misconfigured.items()))
            raise ConfigError(f"fedpara: client {peer} {text}")
        reasons = "; ".join(f"client {peer} {text}" for peer, text in self._out.items())
        raise FedParaError(
            f"fedpara: {reasons}. {left} of {len(self._peers)} client processes are left, and "
            f"{self._needed} needed (fedpara_min_clients): the run ends"
        )
