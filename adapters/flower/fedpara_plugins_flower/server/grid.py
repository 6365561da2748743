"""The server side: a Grid between the strategy, which sees ordinary arrays, and the real Grid."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from fedpara_plugins import FedParaError, PayloadError, merge
from fedpara_plugins.codecs import Payload, decode_payload
from fedpara_plugins.exchange import Size, blind_limit, check_finite, spec_of
from fedpara_plugins_flower.messages import legacy_lists as positional
from fedpara_plugins_flower.messages.records import (
    carried_payload,
    to_record,
    to_tensors,
)
from fedpara_plugins_flower.messages.records import (
    is_optimizer_record as is_side,
)
from fedpara_plugins_flower.messages.reply_marker import Marker
from fedpara_plugins_flower.messages.snippets import ADD_MOD
from fedpara_plugins_flower.privacy import secagg
from fedpara_plugins_flower.privacy.clipping import check_clipped_message
from fedpara_plugins_flower.run import Run
from fedpara_plugins_flower.server.accounting import Accounting, Direction
from fedpara_plugins_flower.server.final_state import FinalState
from fedpara_plugins_flower.server.first_contact import FirstContact
from fedpara_plugins_flower.server.outbox import Outbox
from fedpara_plugins_flower.server.strategy_arrays import averageable, warn_about_integers

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
        return
    models = [record for name, record in message.content.array_records.items() if not is_side(name)]
    if len(models) == 1:
        final.sent(lambda: to_tensors(models[0]))


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

    Attributes:
        fatal: the error that ended the run. The legacy API catches it and would go on.
    """

    def __init__(self, inner: Grid, run: Run, accounting: Accounting, final: FinalState) -> None:
        super().__init__(inner)
        self.fatal: FedParaError | None = None
        self._run = run
        self._accounting = accounting
        self._final = final
        self._outbox = Outbox(run)
        config = run.settings.config
        self._namer = positional.Namer(
            run.specs, plain_names=config.method == "none" and not config.private
        )
        self._first = FirstContact()
        self._told_integers = False
        self._place: tuple[str, str] | None = None
        self._holds: dict[int, Mapping[str, str]] = {}
        # The legacy strategies send and receive from several threads.
        self._lock = threading.RLock()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Encode, send, wait, decode; a client that lost its reference is served once more."""
        plain = list(messages)
        # The legacy API asks each client in a thread of its own, and takes errors for its failure.
        alone = len(plain) == 1 and positional.is_legacy(plain[0])
        try:
            if self.fatal is not None:
                raise self.fatal
            self._begin(plain)
            usable = self._served(self._named(plain), timeout)
            if not alone:
                self._first.check()
        except FedParaError as error:
            if alone and self.fatal is None:
                log.error("%s", error)
            self.fatal = error
            raise
        if not alone:
            self._accounting.close_evaluation()
        return usable

    def finish(self) -> None:
        """The run is over: raise what the legacy API has kept to itself."""
        if self.fatal is not None:
            raise self.fatal
        self._first.check()

    def completed_list(self, shared: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """A list of the shared arrays alone, with the private ones of the server in their places.

        It belongs to the message that was encoded last; for secure aggregation.
        """
        with self._lock:
            names = self._outbox.shared_names(positional.PARAMETERS)
            if len(names) != len(shared):
                return shared
            tensors = {
                name: torch.from_numpy(np.asarray(value))
                for name, value in zip(names, shared, strict=True)
            }
            full = self._outbox.completed(positional.PARAMETERS, tensors)
            return [value.numpy() for value in full.values()]

    def _begin(self, messages: Sequence[Message]) -> None:
        """With the first message of another kind or round, all replies to the first ones are in."""
        for message in messages[:1]:
            place = (message.metadata.message_type, message.metadata.group_id)
            with self._lock:
                if self._place not in (None, place):
                    self._first.check()
                self._place = place

    def _served(self, plain: Sequence[Message], timeout: float | None) -> list[Message]:
        usable, lost = self._exchange(plain, timeout)
        if lost:
            repeated = [message for message in plain if message.metadata.dst_node_id in lost]
            usable += self._exchange(repeated, timeout)[0]
        with self._lock:
            self._outbox.tell_first_contacts()
        return usable

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Encode and push; the legacy strategies' way."""
        return self._inner.push_messages([self._sent(m) for m in self._named(messages)])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull and decode; the legacy strategies' way."""
        usable, lost = self._received(list(self._inner.pull_messages(message_ids)))
        for node in lost:
            log.warning("fedpara: node %d lost its state and sits out this round", node)
        return usable

    def received_by(self, node: int, name: str) -> Mapping[str, Tensor] | None:
        """What a node that has answered made of a record, where the codec lost something of it.

        Args:
            node: whose last answer is meant.
            name: of the record of arrays.
        """
        return self._outbox.references.get(self._holds.get(node, {}).get(name, ""))

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

    def _named(self, messages: Iterable[Message]) -> list[Message]:
        with self._lock:
            plain = list(messages)
            for message in plain:
                secagg.check_settings(message, self._run.settings)
                check_clipped_message(message, self._run.settings)
            return [self._namer.named(message) for message in plain]

    def _sent(self, message: Message) -> Message:
        with self._lock:
            encoded = self._outbox.encoded(message)
            self._first.sent(encoded)
            names = list(message.content.array_records)
            models = [name for name in names if not is_side(name)]
            if len(models) == 1:
                self._final.sent(partial(self._outbox.last_state, models[0]))
            self._accounting.describe_layers(
                message, lambda: chain.from_iterable(map(self._outbox.layers, models))
            )
            self._accounting.sent(encoded, sum(map(self._outbox.size, names), Size()))
            return encoded

    def _received(self, replies: Sequence[Message]) -> tuple[list[Message], set[int]]:
        """The usable replies, decoded, and the nodes that lost what they held."""
        with self._lock:
            self._first.replied(replies)
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
                if marker is None and secagg.is_secagg(reply.content):
                    usable.append(reply)  # a step of the protocol that the app took no part in
                elif marker is None:
                    log.warning(
                        "fedpara: left out node %d: its client answers without the plugin. Add to "
                        "that client: %s",
                        node,
                        ADD_MOD,
                    )
                elif marker.lost:
                    lost.add(node)
                    self._outbox.note_reply(node, marker)
                elif self._decode_in_place(reply):
                    self._first.used()
                    self._outbox.note_reply(node, marker)
                    self._holds[node] = marker.holds
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
                if positional.carries_nothing(record):
                    size += self._masked(reply)
                    continue
                payload = carried_payload(record)
                if payload is None:
                    raise PayloadError(
                        f"record {name!r} carries no payload, or one that was changed on its way: "
                        f"no mod may stand before fedpara.client_mod that changes arrays"
                    )
                first = positional.asks_for_parameters(reply)
                limit = blind_limit(payload) if first else self._outbox.limit(name)
                references = self._outbox.references
                decoded = decode_payload(payload, references=references, limit=limit)
                size += self._outbox.size_of(name, decoded.tensors)
                check_finite(decoded.tensors)
                self._tell_once(decoded.tensors)
                content[name] = to_record(
                    self._first_weights(decoded, limit)
                    if first
                    else averageable(self._outbox.completed(name, decoded.tensors))
                )
            positional.unname_reply(content, reply.metadata.message_type)
        except PayloadError as error:
            node = reply.metadata.src_node_id
            if positional.asks_for_parameters(reply):
                raise FedParaError(
                    f"fedpara: the first weights, of node {node}: {error}"
                ) from error
            log.warning("fedpara: left out the reply of node %d: %s", node, error)
            self._first.left_out(node, str(error))
            return False
        finally:
            self._accounting.received(reply, size)
        reply.content = content
        return True

    def _first_weights(self, payload: Payload, limit: int) -> dict[str, Tensor]:
        """The model that a client starts the run with; the server may never have built one."""
        spec = spec_of(payload.header, payload.tensors, limit=limit)
        mine = self._run.specs.setdefault(frozenset(spec.keys), spec)
        mine.check_equal(spec, here="the server", there="the client that was asked to start")
        private = spec.initial_private(payload.tensors)
        for key in spec.private_factors:  # as in every model that the server builds
            private[key].zero_()
        return merge(spec, payload.tensors, private)

    def _masked(self, reply: Message) -> Size:
        """What stands behind a masked list: the shared part of what the client received."""
        if not secagg.is_secagg(reply.content):
            return Size()
        return self._outbox.size(positional.PARAMETERS)

    def _tell_once(self, tensors: Mapping[str, Tensor]) -> None:
        if not self._told_integers:
            self._told_integers = True
            warn_about_integers(tensors, self._run.strategy)
