"""What server and clients say to each other over FedML's transports, beside the model.

FedML's own messages have the types 0 to 8; ours are far from them, so that a party without the
plugin is noticed at its first word. One value of a message is our envelope as plain bytes, under
FedML's key for the model (MQTT_S3 moves it to the store); the others are short texts and numbers.

Three messages are made so that a party without the plugin understands them. HELLO travels as
FedML's own "this client is online", with a mark: FedML's server counts the client and, when all are
there, sends each of them its first model, by which each learns what kind of server that is. CHECK
is FedML's own "who is there", with the mark, for clients of FedML's own whose one word was lost (a
broker keeps nothing for a server that comes later); ours take it as a PULSE. FAILED goes to a party
that may be without the plugin with the reason in the place of its type: FedML logs an unknown type,
and ends.

    client                      server
    HELLO     ------------->             who I am; again and again until
              <-------------    WELCOME
              <-------------    TASK     a round's model, for one data silo
    ANSWER    ------------->             its reply, or why there is none
              <-------------    FINISH   the last model        (or FAILED: why the run ends)
    BYE       ------------->
              <-------------    CLOSE    everybody has said BYE
    PULSE     <------------>    PULSE    I am alive, all the time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

__all__ = [
    "ANSWER", "BROKEN", "BYE", "CHECK", "CLOSE", "FAILED", "FINISH", "GONE", "HELLO", "MARK",
    "NAMES", "ONLINE", "PULSE", "READY", "STOCK", "TASK", "WELCOME", "WORD", "Event",
]  # fmt: skip

READY = 0
"""FedML's own: the transport of this process is there."""

STOCK = (1, 2, 3, 4, 5, 6, 7, 8)
"""FedML's own messages: who sends them runs without the plugin."""

ONLINE, CHECK = 5, 6
"""Of these: a client has come; a server asks its clients, before all have come, who is there."""

MARK: Mapping[str, str] = MappingProxyType({"client_status": "ONLINE", "fedpara": "hello"})
"""Fields of a HELLO or CHECK: FedML's own, and the one by which ours is told from FedML's."""

WORD = "fedpara: "
"""How a type begins that is a reason."""

HELLO, WELCOME, TASK, ANSWER, FINISH, FAILED, BYE, CLOSE, PULSE = range(9001, 9010)

GONE, BROKEN = -1, -2
"""No messages: a party is silent, or our own transport has ended."""

NAMES: Mapping[int, str] = MappingProxyType(
    {
        HELLO: "hello",
        WELCOME: "welcome",
        TASK: "task",
        ANSWER: "answer",
        FINISH: "finish",
        FAILED: "failed",
        BYE: "bye",
        CLOSE: "close",
        PULSE: "pulse",
    }
)


@dataclass(frozen=True)
class Event:
    """Something that the main thread has to deal with.

    Attributes:
        kind: a message's type, or `GONE`, or `BROKEN`.
        peer: whose it is.
        data: the envelope, of anyone: not checked yet.
        fields: the short values; `text` and `number` read them.
    """

    kind: int
    peer: int
    data: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def text(self, key: str) -> str:
        """A short text; "" if there is none."""
        return str(self.fields.get(key) or "")[:2000]

    def number(self, key: str) -> int:
        """A number; -1 if there is none."""
        value = self.fields.get(key)
        return value if type(value) is int else -1
