"""A round's replies: who was asked, who answered, and who was left out for which reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fedpara_plugins import ConfigError, FedParaError, MismatchError
from fedpara_plugins.exchange import Outliers, ReadRecord
from fedpara_plugins_fedml.rules import ClientReply

__all__ = ["Replies"]

log = logging.getLogger("fedpara.fedml")


class Replies:
    """The replies of one round.

    Args:
        number: of the round.
        asked: the names of its clients.
    """

    def __init__(self, number: int, asked: Sequence[str]) -> None:
        self.asked = tuple(asked)
        self._number = number
        self._found: dict[str, ClientReply] = {}
        self._excluded: dict[str, str] = {}
        self._misconfigured: dict[str, str] = {}
        self._outliers = Outliers()

    def check_awaited(self, client: str) -> None:
        """Raise unless a client was asked and is not excluded.

        Raises:
            MismatchError: its reply does not count.
        """
        if client not in self.asked or client in self._excluded:
            raise MismatchError(f"client {client} answers, and was not asked in this round")

    def take(self, reply: ClientReply, model: ReadRecord | None = None) -> None:
        """Take in a reply; a client's later one replaces its earlier one.

        Args:
            reply: of the client.
            model: its model, as it was read; None if it has none.
        """
        self._found[reply.client] = reply
        if model is not None and model.norm is not None:
            self._outliers.add(reply.client, model.norm, model.size or 0.0)

    def name_outliers(self, option: str) -> None:
        """Name the clients whose updates are far outside of the others', when all are in.

        Args:
            option: ``outliers``: ``warn``, ``leave_out`` or ``ignore``.
        """
        if option == "ignore":
            return
        for client, reason in self._outliers.reasons().items():
            if option == "leave_out":
                self.exclude(client, reason)
            else:
                log.warning("fedpara: client %s in round %d: %s", client, self._number, reason)

    def exclude(self, client: str, reason: object) -> None:
        """Leave a client out, with a line in the log that names it."""
        text = str(reason).removeprefix("fedpara: ")
        log.warning("fedpara: left out client %s in round %d: %s", client, self._number, text)
        self._excluded[client] = text
        if isinstance(reason, ConfigError):
            self._misconfigured[client] = text
        self._found.pop(client, None)
        self._outliers.discard(client)

    def forget(self) -> None:
        """Forget all replies: everybody answers once more, except who is excluded."""
        self._found = {}
        self._outliers = Outliers()

    def enough(self, needed: int) -> list[ClientReply]:
        """Return the usable replies, in the order in which clients were asked.

        Args:
            needed: how many at least; 0 asks for one.

        Raises:
            ConfigError: there is none, and a client says that its configuration is the reason.
            FedParaError: there are fewer; it gives everybody's reason.
        """
        needed = needed or 1
        if not self._found:
            for client, why in self._misconfigured.items():
                own = f"client {client}: "
                raise ConfigError(f"fedpara: {own}{why.removeprefix(own)}")
        if len(self._found) < needed:
            reasons = "; ".join(f"client {name}: {why}" for name, why in self._excluded.items())
            raise FedParaError(
                f"fedpara: round {self._number} has {len(self._found)} usable answers of "
                f"{len(self.asked)} clients, {needed} needed (fedpara_min_clients). "
                f"{reasons or 'Nobody answered'}"
            )
        return [self._found[name] for name in self.asked if name in self._found]
