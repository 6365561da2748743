"""Grids that change nothing: one that hands everything on, and one that counts what passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedpara_plugins.ledger import Direction
from fedpara_plugins_flower.messages.records import is_optimizer_record, to_tensors
from fedpara_plugins_flower.seams import forward_grid
from fedpara_plugins_flower.server.accounting import Accounting
from fedpara_plugins_flower.server.final_state import FinalState

__all__ = ["ForwardingGrid", "ObservingGrid", "follow"]


class ForwardingGrid(Grid):
    """Hands everything on to another Grid, whatever methods this version of Flower's Grid has."""

    def __init__(self, inner: Grid) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


# Methods of Grid exist on every subclass, so `__getattr__` alone is never asked for them.
forward_grid(ForwardingGrid, "_inner")


class ObservingGrid(ForwardingGrid):
    """Counts what passes and changes nothing: the Grid of a run with method and codec ``none``."""

    def __init__(self, inner: Grid, accounting: Accounting, final: FinalState) -> None:
        super().__init__(inner)
        self._accounting = accounting
        self._final = final

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send and receive as Flower's Grid does, and count."""
        sent = self._counted(messages, "down")
        replies = self._counted(self._inner.send_and_receive(sent, timeout=timeout), "up")
        self._accounting.close_evaluation()
        return replies

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push as Flower's Grid does, and count."""
        return self._inner.push_messages(self._counted(messages, "down"))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull as Flower's Grid does, and count."""
        return self._counted(self._inner.pull_messages(message_ids), "up")

    def _counted(self, messages: Iterable[Message], direction: Direction) -> list[Message]:
        found = list(messages)
        for message in found:
            self._accounting.plain(message, direction)
            if direction == "up":
                self._accounting.evaluated(message)
            follow(self._final, message, direction)
        return found


def follow(final: FinalState, message: Message, direction: Direction) -> None:
    """Tell the global model's follower what a message means for it."""
    if direction == "up":
        if message.metadata.message_type.startswith("train"):
            final.trained()
        return
    models = [
        record
        for name, record in message.content.array_records.items()
        if not is_optimizer_record(name)
    ]
    if len(models) == 1:
        final.sent(lambda: to_tensors(models[0]))
