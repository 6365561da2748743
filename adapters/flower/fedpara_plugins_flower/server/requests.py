"""The messages that await an answer, by node: what the server has asked for, and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message

from fedpara_plugins import MismatchError
from fedpara_plugins_flower.messages import legacy_lists
from fedpara_plugins_flower.messages.drift_records import CHANGE, OPTIMIZER
from fedpara_plugins_flower.privacy import secagg

__all__ = ["Request", "Requests"]

MOST = 16
"""Messages to one node that may await an answer; older ones are given up."""


@dataclass(frozen=True)
class Request:
    """The properties of a message that its answer is compared with.

    Attributes:
        kind: the message's type.
        legacy: whether it comes from a strategy of the legacy API.
        masked: whether it belongs to secure aggregation.
        side: records beside the model that it asks for.
        reports: whether it asks for the report of an optimizer of the plugin.
    """

    kind: str
    legacy: bool = False
    masked: bool = False
    side: frozenset[str] = frozenset()
    reports: bool = False

    @classmethod
    def of(cls, message: Message) -> Request:
        """Return the properties of a message to a client."""
        task = message.content.get(OPTIMIZER)
        variates = isinstance(task, ConfigRecord) and task.get("algorithm") == "scaffold"
        return cls(
            kind=message.metadata.message_type,
            legacy=legacy_lists.is_legacy(message),
            masked=secagg.is_secagg(message.content),
            side=frozenset({CHANGE}) if variates else frozenset(),
            reports=task is not None,
        )

    @property
    def first_weights(self) -> bool:
        """Whether a client was asked for the weights that the run starts with."""
        return self.kind == legacy_lists.GET_PARAMETERS


class Requests:
    """Keeps each message until it is answered."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Request]] = defaultdict(list)

    def note(self, message: Message) -> None:
        """Note a message that goes out."""
        waiting = self._waiting[message.metadata.dst_node_id]
        waiting.append(Request.of(message))
        del waiting[:-MOST]

    def take(self, reply: Message) -> Request:
        """Return what a reply answers, and await that no longer.

        Raises:
            MismatchError: the node was asked nothing (any more), or something else.
        """
        kind, waiting = reply.metadata.message_type, self._waiting[reply.metadata.src_node_id]
        found = next((place for place, each in enumerate(waiting) if each.kind == kind), None)
        if found is not None:
            return waiting.pop(found)
        if not waiting:
            del self._waiting[reply.metadata.src_node_id]
            raise MismatchError("it answers, and was not asked, or has answered already")
        asked = waiting.pop(0)
        raise MismatchError(f"it answers as {kind[:80]!r}, and was asked for {asked.kind!r}")

    def give_up(self, nodes: Collection[int]) -> None:
        """Await nothing more of some nodes, whose time is over."""
        for node in nodes:
            self._waiting.pop(node, None)

    @property
    def any_left(self) -> bool:
        """Whether an answer is awaited."""
        return any(self._waiting.values())
