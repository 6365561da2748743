"""The descriptions that a server shares with its clients, to which headers refer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from fedpara_plugins.codecs import Description

__all__ = ["SharedDescriptions"]

MOST_KNOWN = 64
"""Descriptions that are kept for replies; a run has one for each record while its model stays."""


class SharedDescriptions:
    """What each client holds of the records' descriptions.

    A client that has answered a message holds the description of each of its records. Nothing here
    survives the process: a server that starts again writes headers whole until clients answer.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, Description] = OrderedDict()
        self._current: dict[str, Description] = {}
        self._sent: dict[tuple[str, str], str] = {}
        self._held: dict[str, dict[str, str]] = {}

    @property
    def known(self) -> Mapping[str, Description]:
        """The descriptions of what was sent, by hash."""
        return self._known

    def put(self, record: str, description: Description) -> None:
        """Send a record of this description from now on."""
        description = self._known.setdefault(description.digest, description)
        self._known.move_to_end(description.digest)
        while len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        self._current[record] = description

    def current(self, record: str) -> Description:
        """Return the description of what is sent under a name."""
        return self._current[record]

    def held(self, client: str, record: str) -> str | None:
        """Return the hash of the description that a client holds of a record."""
        return self._held.get(client, {}).get(record)

    def note_sent(self, client: str, record: str) -> None:
        """Note that a client is sent the record as it is now."""
        self._sent[client, record] = self._current[record].digest

    def note_held(self, client: str, record: str) -> None:
        """Note that a client has answered what it was last sent; other records are ignored."""
        sent = self._sent.get((client, record))
        if sent is not None:
            self._held.setdefault(client, {})[record] = sent

    def forget(self, client: str) -> None:
        """Note that a client has lost something, so that it may have lost everything."""
        self._held.pop(client, None)
