"""The server side: a Grid between the strategy, which sees ordinary arrays, and the real Grid."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

from flwr.common import Message, RecordDict
from flwr.serverapp import Grid

from fedpara_plugins import ConfigError, FedParaError, PayloadError
from fedpara_plugins.codecs import decode_payload
from fedpara_plugins_flower.accounting import Accounting, Direction, Size
from fedpara_plugins_flower.coding import check_finite
from fedpara_plugins_flower.final_state import FinalState
from fedpara_plugins_flower.marker import Marker
from fedpara_plugins_flower.outbox import Outbox
from fedpara_plugins_flower.records import carried_payload, to_record, to_tensors
from fedpara_plugins_flower.run import Run

__all__ = ["CodecGrid", "ForwardingGrid", "ObservingGrid"]

log = logging.getLogger("flwr.fedpara")


class ForwardingGrid(Grid):
    """Hands everything on to another Grid, whatever methods this version of Flower's Grid has."""

    def __init__(self, inner: Grid) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _forwarder(name: str) -> Any:
    if isinstance(getattr(Grid, name), property):
        return property(lambda self: getattr(self._inner, name))
    return lambda self, *args, **kwargs: getattr(self._inner, name)(*args, **kwargs)


# Grid's methods exist on every subclass, so __getattr__ alone would never be asked for them.
for _name in [name for name in vars(Grid) if not name.startswith("_")]:
    setattr(ForwardingGrid, _name, _forwarder(_name))
ForwardingGrid.__abstractmethods__ = frozenset()


class ObservingGrid(ForwardingGrid):
    """Counts what passes and changes nothing: the Grid of a run with method and codec ``none``."""

    def __init__(self, inner: Grid, accounting: Accounting, final: FinalState) -> None:
        super().__init__(inner)
        self._accounting = accounting
        self._final = final

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As Flower's, counted."""
        sent = self._counted(messages, "down")
        replies = self._counted(self._inner.send_and_receive(sent, timeout=timeout), "up")
        self._accounting.close_evaluation()
        return replies

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As Flower's, counted."""
        return self._inner.push_messages(self._counted(messages, "down"))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As Flower's, counted."""
        return self._counted(self._inner.pull_messages(message_ids), "up")

    def _counted(self, messages: Iterable[Message], direction: Direction) -> list[Message]:
        found = list(messages)
        for message in found:
            self._accounting.plain(message, direction)
            if direction == "up":
                self._accounting.evaluated(message)
            _follow(self._final, message, direction)
        return found


def _follow(final: FinalState, message: Message, direction: Direction) -> None:
    """Tell the global model's follower what a message means for it."""
    if direction == "up":
        if message.metadata.message_type.startswith("train"):
            final.trained()
    elif len(message.content.array_records) == 1:
        record = next(iter(message.content.array_records.values()))
        final.sent(lambda: to_tensors(record))


class CodecGrid(ForwardingGrid):
    """Encodes what the strategy sends and decodes what the clients answer.

    A reply that cannot be used is logged with its node and left out, so the round completes with
    the others. The run ends with an error only when the first messages show that the plugin is
    missing, or set up otherwise, on the clients.

    Args:
        inner: the Grid of the engine.
        run: the run's settings and the models built in it.
        accounting: where the bytes are counted.
        final: follows the global model.
    """

    def __init__(self, inner: Grid, run: Run, accounting: Accounting, final: FinalState) -> None:
        super().__init__(inner)
        self._accounting = accounting
        self._final = final
        self._outbox = Outbox(run)
        self._met_plugin = False
        # The legacy strategies push and pull from several threads.
        self._lock = threading.RLock()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Encode, send, wait, decode; a client that lost its reference is served once more."""
        plain = list(messages)
        usable, lost = self._exchange(plain, timeout)
        if lost:
            repeated = [message for message in plain if message.metadata.dst_node_id in lost]
            usable += self._exchange(repeated, timeout)[0]
        self._outbox.tell_first_contacts()
        self._accounting.close_evaluation()
        return usable

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Encode and push; the legacy strategies' way."""
        return self._inner.push_messages([self._sent(message) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull and decode; the legacy strategies' way."""
        usable, lost = self._received(list(self._inner.pull_messages(message_ids)))
        for node in lost:
            log.warning("fedpara: node %d lost its state and sits out this round", node)
        return usable

    def close(self) -> None:
        """The run is over; references in files stay for the next one."""
        self._outbox.close()

    def _exchange(
        self, messages: Sequence[Message], timeout: float | None
    ) -> tuple[list[Message], set[int]]:
        sent = [self._sent(message) for message in messages]
        replies = list(self._inner.send_and_receive(sent, timeout=timeout))
        answered = {reply.metadata.src_node_id for reply in replies}
        for message in sent:
            if message.metadata.dst_node_id not in answered:
                node = message.metadata.dst_node_id
                log.warning("fedpara: node %d has not answered in time and is left out", node)
        return self._received(replies)

    def _sent(self, message: Message) -> Message:
        with self._lock:
            encoded = self._outbox.encoded(message)
            names = list(message.content.array_records)
            if len(names) == 1:
                self._final.sent(partial(self._outbox.last_state, names[0]))
            self._accounting.describe_layers(
                message, lambda: chain.from_iterable(map(self._outbox.layers, names))
            )
            self._accounting.sent(encoded, sum(map(self._outbox.size, names), Size()))
            return encoded

    def _received(self, replies: Sequence[Message]) -> tuple[list[Message], set[int]]:
        """The usable replies, decoded, and the nodes that lost what they held."""
        with self._lock:
            self._check_first_contact(replies)
            usable: list[Message] = []
            lost: set[int] = set()
            fresh = 0
            for reply in replies:
                _follow(self._final, reply, "up")
                node = reply.metadata.src_node_id
                if reply.has_error():
                    usable.append(reply)
                    continue
                marker = Marker.taken_from(reply.content)
                if marker is None:
                    log.warning("fedpara: left out node %d: it answers without the plugin", node)
                elif marker.lost:
                    lost.add(node)
                    self._outbox.note_reply(node, marker)
                elif self._decode_in_place(reply):
                    self._outbox.note_reply(node, marker)
                    fresh += marker.fresh
                    self._accounting.evaluated(reply)
                    usable.append(reply)
            if fresh:
                log.info("fedpara: %d clients started from the seeded private factors", fresh)
            return usable, lost

    def _decode_in_place(self, reply: Message) -> bool:
        content = RecordDict(dict(reply.content.items()))
        size = Size()
        try:
            for name, record in reply.content.array_records.items():
                payload = carried_payload(record)
                if payload is None:
                    raise PayloadError(f"record {name!r} carries no payload")
                limit = self._outbox.limit(name)
                references = self._outbox.references
                tensors = decode_payload(payload, references=references, limit=limit).tensors
                size += self._outbox.size_of(name, tensors)
                check_finite(tensors)
                content[name] = to_record(self._outbox.completed(name, tensors))
        except PayloadError as error:
            node = reply.metadata.src_node_id
            log.warning("fedpara: left out the reply of node %d: %s", node, error)
            return False
        finally:
            self._accounting.received(reply, size)
        reply.content = content
        return True

    def _check_first_contact(self, replies: Sequence[Message]) -> None:
        """End the run while nothing is lost yet, if no client speaks the plugin's language."""
        if self._met_plugin or not replies:
            return
        sound = [reply for reply in replies if not reply.has_error()]
        self._met_plugin = any("fedpara" in reply.content for reply in sound)
        if self._met_plugin:
            return
        if sound:
            raise ConfigError(
                f"fedpara: the clients (node {sound[0].metadata.src_node_id}, for one) answer "
                f"without the plugin, while this run's config turns it on. Add to the client: "
                f"app = ClientApp(mods=[fedpara.client_mod]), the mod first in the list"
            )
        reasons = [(r.metadata.src_node_id, r.error.reason or "") for r in replies]
        own = [(node, reason) for node, reason in reasons if "fedpara" in reason]
        if own:
            node, reason = own[0]
            raise FedParaError(
                f"fedpara: all {len(replies)} clients failed at the first message. If node {node} "
                f"names unexpected keys, its app lacks mods=[fedpara.client_mod]. It said: {reason}"
            )
