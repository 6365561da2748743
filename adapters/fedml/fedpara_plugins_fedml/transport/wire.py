"""Conversion between the plugin's messages and FedML's.

Some messages are made so that a process without the plugin understands them, see `protocol`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpara_plugins_fedml.seams import MODEL_KEY, Message
from fedpara_plugins_fedml.transport.protocol import (
    CHECK,
    FAILED,
    FEDML_TYPES,
    HEARTBEAT,
    HELLO,
    ONLINE,
    PLUGIN_FIELDS,
    REASON_PREFIX,
    TYPE_NAMES,
)

__all__ = ["OutgoingMessage", "failure_reason", "message_type", "sender_of"]


@dataclass(frozen=True)
class OutgoingMessage:
    """A message that waits to be sent.

    Attributes:
        kind: one of the plugin's types, or CHECK.
        data: an envelope, if any.
        fields: the short values.
    """

    kind: int
    data: bytes | None
    fields: Mapping[str, Any]

    def to_fedml(self, sender: int, receiver: int, *, plain: bool) -> Message:
        """Return FedML's message.

        Args:
            sender: id of this process.
            receiver: id of the peer.
            plain: whether that peer may lack the plugin.
        """
        kind: int | str = ONLINE if self.kind == HELLO else self.kind
        if self.kind == FAILED and plain:
            kind = f"{REASON_PREFIX}{self.fields.get('reason')}"
        message = Message(kind, sender, receiver)
        if self.data is not None:
            message.add_params(MODEL_KEY, self.data)
        extra = PLUGIN_FIELDS if self.kind in (HELLO, CHECK) else {}
        for key, value in {**extra, **self.fields}.items():
            message.add_params(key, value)
        return message


def sender_of(entry: Any) -> int | None:
    """Return the sender of what a transport has received; None if FedML's loop cannot read it.

    Args:
        entry: a message, or with gRPC its pickle, which FedML's loop loads as well.
    """
    try:
        found = pickle.loads(entry) if isinstance(entry, bytes) else entry
        return int(found.get_sender_id()) if isinstance(found, Message) else None
    except Exception:
        return None


def message_type(kind: Any, fields: Mapping[str, Any]) -> int:
    """Return the type of a received message: one of the plugin's, or of FedML's own.

    Args:
        kind: the type as it was received.
        fields: the message's values.

    Raises:
        ValueError, TypeError, OverflowError: if it is neither.
    """
    if isinstance(kind, str) and kind.startswith(REASON_PREFIX):
        return FAILED
    number = int(kind)
    if number in (ONLINE, CHECK) and fields.get("fedpara") == PLUGIN_FIELDS["fedpara"]:
        return HELLO if number == ONLINE else HEARTBEAT
    if number not in (*FEDML_TYPES, *TYPE_NAMES) or number == HELLO:
        raise ValueError(f"type {number}")
    return number


def failure_reason(message: Message) -> str:
    """Return the reason in a FAILED, which may be its type; see `protocol`."""
    kind = message.get_type()
    return kind.removeprefix(REASON_PREFIX) if isinstance(kind, str) else str(message.get("reason"))
