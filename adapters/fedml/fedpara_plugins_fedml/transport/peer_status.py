"""The state of a process's peers: when they were last heard, and which of them are gone."""

from __future__ import annotations

import time
from collections.abc import Sequence

__all__ = ["PeerStatus"]


class PeerStatus:
    """The state of each peer. Several threads use it; each call changes one entry.

    Args:
        peers: their ids.
    """

    def __init__(self, peers: Sequence[int]) -> None:
        self._peers = tuple(peers)
        self._last_heard: dict[int, float] = {}
        self._ever_heard: set[int] = set()
        self._with_plugin: set[int] = set()
        self._gone: set[int] = set()
        self._first_sent: dict[int, float] = {}

    # Receiving

    def heard(self, peer: int, *, with_plugin: bool) -> None:
        """Record that a message has come from a peer.

        Args:
            peer: that sent it.
            with_plugin: whether it is a message of the plugin.
        """
        self._last_heard[peer] = time.monotonic()
        self._ever_heard.add(peer)
        if with_plugin:
            self._with_plugin.add(peer)

    def silent_for(self, peer: int, now: float) -> float:
        """Return the seconds since a peer was last heard; 0 if it never was, or is gone."""
        return now - self._last_heard.get(peer, now)

    def restart_clocks(self, now: float) -> None:
        """Count the peers' silence from now on, after this process itself was suspended."""
        self._last_heard = dict.fromkeys(self._last_heard, now)

    # Sending

    def sending(self, peer: int) -> bool:
        """Record the first attempt to send to a peer; return whether this is the first."""
        first = peer not in self._first_sent
        self._first_sent.setdefault(peer, time.monotonic())
        return first

    def not_sent(self, peer: int) -> None:
        """Record that the first attempt has failed."""
        self._first_sent.pop(peer, None)

    def unanswered_for(self, peer: int) -> float:
        """Return the seconds since a peer that was never heard took the first message.

        The result is 0 if the peer has taken none, or has been heard.
        """
        if peer in self._last_heard or peer not in self._first_sent:
            return 0.0
        return time.monotonic() - self._first_sent[peer]

    # Which peers

    def has_plugin(self, peer: int) -> bool:
        """Return whether a peer has sent a message of the plugin."""
        return peer in self._with_plugin

    def without_plugin(self) -> set[int]:
        """Return the peers that have been heard, but with no message of the plugin."""
        return self._ever_heard - self._with_plugin

    def unheard(self) -> set[int]:
        """Return the peers that have never been heard."""
        return set(self._peers) - self._ever_heard

    def gone(self) -> set[int]:
        """Return the peers from which nothing is expected any more."""
        return set(self._gone)

    def is_gone(self, peer: int) -> bool:
        """Return whether nothing is expected from a peer any more."""
        return peer in self._gone

    def mark_gone(self, peer: int) -> None:
        """Expect nothing from a peer any more, until it is heard again."""
        self._gone.add(peer)
        self._last_heard.pop(peer, None)

    def mark_back(self, peer: int) -> None:
        """Expect messages from a peer again."""
        self._gone.discard(peer)
