"""The messages between server and clients over FedML's transports.

FedML's own messages have the types 1 to 8. The plugin's types are far from them, so that a process
without the plugin is recognised by its first message. One value of a message is the envelope as
plain bytes, under FedML's key for the model (MQTT_S3 moves it to the store). The others are short
texts and numbers.

Three messages are understood by processes without the plugin. HELLO is sent as FedML's own "this
client is online", with a field of the plugin. FedML's server counts the client and, when all are
there, sends each of them its first model, by which each client learns what kind of server that is.
CHECK is FedML's own "who is there", with the field. It is for FedML's own clients whose one message
was lost (a broker keeps nothing for a server that comes later); the plugin's clients take it as a
HEARTBEAT. FAILED has the reason in the place of its type if the receiver may lack the plugin: FedML
logs an unknown type, and ends.

    client                        server
    HEARTBEAT <-------------->    HEARTBEAT  sent all the time
    HELLO     --------------->               who I am; repeated until
              <---------------    WELCOME
              <---------------    TASK       a round's model, for one data silo
    REPLY     --------------->               its reply, or why there is none
              <---------------    FINISH     the last model        (or FAILED: why the run ends)
    BYE       --------------->
              <---------------    CLOSE      all clients have sent BYE

A HELLO may carry the reason why its process cannot take part. FAILED answers it, and the process
ends; under ``mpirun``, which would end all others then, WELCOME does, and it waits for FINISH. For
the same reason FedML's own process gets FedML's own FINISH there, when all others have ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fedpara_plugins.support import printable
from fedpara_plugins_fedml.seams import (
    CHECK,
    FEDML_FINISH,
    FEDML_TYPES,
    ONLINE,
    ONLINE_STATUS,
    READY,
)

__all__ = [
    "BROKEN", "BYE", "CHECK", "CLOSE", "FAILED", "FEDML_FINISH", "FEDML_TYPES", "FINISH", "GONE",
    "HEARTBEAT", "HELLO", "ONLINE", "PLUGIN_FIELDS", "READY", "REASON_PREFIX", "REPLY", "TASK",
    "TYPE_NAMES", "UNREADABLE", "WELCOME", "Event",
]  # fmt: skip

PLUGIN_FIELDS: Mapping[str, str] = MappingProxyType({**ONLINE_STATUS, "fedpara": "hello"})
"""Fields of a HELLO or CHECK: FedML's own, and the one by which the plugin's is recognised."""

REASON_PREFIX = "fedpara: "
"""Beginning of a message type that is a reason."""

HELLO, WELCOME, TASK, REPLY, FINISH, FAILED, BYE, CLOSE, HEARTBEAT = range(9001, 9010)

GONE, BROKEN, UNREADABLE = -1, -2, -3
"""Events without a known message: a peer is silent, this process's transport has ended, or a peer
has sent something of another type."""

TYPE_NAMES: Mapping[int, str] = MappingProxyType(
    {
        HELLO: "hello",
        WELCOME: "welcome",
        TASK: "task",
        REPLY: "reply",
        FINISH: "finish",
        FAILED: "failed",
        BYE: "bye",
        CLOSE: "close",
        HEARTBEAT: "heartbeat",
    }
)


@dataclass(frozen=True)
class Event:
    """A message or a failure that the main thread has to handle.

    Attributes:
        kind: a message's type, or `GONE`, or `BROKEN`.
        peer: that sent it, or that failed.
        data: the envelope, not checked yet; the sender is not trusted.
        fields: the short values; `text` and `number` read them.
    """

    kind: int
    peer: int
    data: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is, in words."""
        if self.kind == UNREADABLE:
            return self.text("reason")
        if self.kind in FEDML_TYPES:
            return f"FedML's own message {self.kind}"
        return f"a {TYPE_NAMES.get(self.kind, self.kind)}"

    def text(self, key: str) -> str:
        """Return a short text, as one line; "" if there is none, or something else."""
        value = self.fields.get(key)
        return printable(value[:2000]) if isinstance(value, str) else ""

    def number(self, key: str) -> int:
        """Return a number; -1 if there is none."""
        value = self.fields.get(key)
        return value if type(value) is int else -1
