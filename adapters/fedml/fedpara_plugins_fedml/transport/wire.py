"""Our messages as FedML's, and back; also such that a party without the plugin understands them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedml.core.distributed.communication.message import Message

from fedpara_plugins_fedml.transport.protocol import (
    CHECK,
    FAILED,
    HELLO,
    MARK,
    NAMES,
    ONLINE,
    PULSE,
    STOCK,
    WORD,
)

__all__ = ["Handlers", "Letter", "kind_of", "reason_of"]


@dataclass(frozen=True)
class Letter:
    """A message that waits to be sent.

    Attributes:
        kind: one of ours, or CHECK.
        data: an envelope, if any.
        fields: the short values.
    """

    kind: int
    data: bytes | None
    fields: Mapping[str, Any]

    def message(self, own: int, peer: int, *, plain: bool) -> Message:
        """As FedML's.

        Args:
            own: who sends it.
            peer: who gets it.
            plain: whether that party may be without the plugin.
        """
        kind: int | str = ONLINE if self.kind == HELLO else self.kind
        if self.kind == FAILED and plain:
            kind = f"{WORD}{self.fields.get('reason')}"
        message = Message(kind, own, peer)
        if self.data is not None:
            message.add_params(Message.MSG_ARG_KEY_MODEL_PARAMS, self.data)
        mark = MARK if self.kind in (HELLO, CHECK) else {}
        for key, value in {**mark, **self.fields}.items():
            message.add_params(key, value)
        return message


class Handlers(dict[Any, Any]):
    """Handlers of messages by type, with one for all other types.

    Args:
        known: handlers by type.
        other: that of all others. Without it an unknown type ends FedML's loop.
    """

    def __init__(self, known: Mapping[Any, Any], other: Any) -> None:
        super().__init__(known)
        self._other = other

    def __missing__(self, kind: Any) -> Any:
        return self._other


def kind_of(kind: Any, fields: Mapping[str, Any]) -> int:
    """What a message is: one of our types, or of FedML's own.

    Args:
        kind: its type as it came.
        fields: its values.

    Raises:
        ValueError, TypeError, OverflowError: it is neither.
    """
    if isinstance(kind, str) and kind.startswith(WORD):
        return FAILED
    number = int(kind)
    if number in (ONLINE, CHECK) and fields.get("fedpara") == MARK["fedpara"]:
        return HELLO if number == ONLINE else PULSE
    if number not in (*STOCK, *NAMES) or number == HELLO:
        raise ValueError(f"type {number}")
    return number


def reason_of(message: Message) -> str:
    """The reason in a FAILED: its type where the sender did not know who reads it."""
    kind = message.get_type()
    return kind.removeprefix(WORD) if isinstance(kind, str) else str(message.get("reason"))
