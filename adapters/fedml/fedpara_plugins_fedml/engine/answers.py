"""A round's answers: who was asked, who answered, and who was left out for which reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fedpara_plugins import FedParaError, MismatchError
from fedpara_plugins_fedml.rules import ClientReply as Answer

__all__ = ["Answers"]

log = logging.getLogger("fedpara.fedml")


class Answers:
    """Of one round.

    Args:
        number: of the round.
        asked: the names of its clients.
    """

    def __init__(self, number: int, asked: Sequence[str]) -> None:
        self.asked = tuple(asked)
        self._number = number
        self._found: dict[str, Answer] = {}
        self._excluded: dict[str, str] = {}

    def check_awaited(self, client: str) -> None:
        """Raise unless a client was asked, and counts still.

        Raises:
            MismatchError: it does not.
        """
        if client not in self.asked or client in self._excluded:
            raise MismatchError(f"client {client} answers, and was not asked in this round")

    def take(self, answer: Answer) -> None:
        """Take one in; a client's later one replaces its earlier one."""
        self._found[answer.client] = answer

    def exclude(self, client: str, reason: object) -> None:
        """Leave a client out, with a line in the log that names it."""
        text = str(reason).removeprefix("fedpara: ")
        log.warning("fedpara: left out client %s in round %d: %s", client, self._number, text)
        self._excluded[client] = text
        self._found.pop(client, None)

    def forget(self) -> None:
        """All that were asked answer once more; who is excluded stays so."""
        self._found = {}

    def enough(self, needed: int) -> list[Answer]:
        """The usable answers, in the order in which clients were asked.

        Args:
            needed: how many at least; 0 asks for one.

        Raises:
            FedParaError: there are fewer; it gives everybody's reason.
        """
        needed = needed or 1
        if len(self._found) < needed:
            reasons = "; ".join(f"client {name}: {why}" for name, why in self._excluded.items())
            raise FedParaError(
                f"fedpara: round {self._number} has {len(self._found)} usable answers of "
                f"{len(self.asked)} clients, {needed} needed (fedpara_min_clients). "
                f"{reasons or 'Nobody answered'}"
            )
        return [self._found[name] for name in self.asked if name in self._found]
