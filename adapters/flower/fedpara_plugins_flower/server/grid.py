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
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from fedpara_plugins import FedParaError
from fedpara_plugins.exchange import Size
from fedpara_plugins_flower.messages import legacy_lists
from fedpara_plugins_flower.messages.records import is_optimizer_record
from fedpara_plugins_flower.messages.reply_marker import Marker
from fedpara_plugins_flower.messages.snippets import ADD_MOD
from fedpara_plugins_flower.privacy import secagg
from fedpara_plugins_flower.privacy.clipping import check_clipped_message
from fedpara_plugins_flower.run import Run
from fedpara_plugins_flower.server.accounting import Accounting
from fedpara_plugins_flower.server.final_state import FinalState
from fedpara_plugins_flower.server.first_contact import FirstContact
from fedpara_plugins_flower.server.observing_grid import ForwardingGrid, follow
from fedpara_plugins_flower.server.outbox import Outbox
from fedpara_plugins_flower.server.reply_decoder import ReplyDecoder

__all__ = ["CodecGrid"]

log = logging.getLogger("flwr.fedpara")


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
        self._namer = legacy_lists.Namer(
            run.specs, plain_names=config.method == "none" and not config.private
        )
        self._first = FirstContact()
        self._replies = ReplyDecoder(run, self._outbox, accounting, self._first)
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
        alone = len(plain) == 1 and legacy_lists.is_legacy(plain[0])
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
        """End the run: raise what the legacy API has kept to itself."""
        if self.fatal is not None:
            raise self.fatal
        self._first.check()

    def completed_list(self, shared: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return a list of shared arrays with the server's private ones in their places.

        It belongs to the message that was encoded last; for secure aggregation.
        """
        with self._lock:
            if not self._outbox.has_record(legacy_lists.PARAMETERS):
                return shared
            names = self._outbox.shared_names(legacy_lists.PARAMETERS)
            if len(names) != len(shared):
                return shared
            tensors = {
                name: torch.from_numpy(np.asarray(value))
                for name, value in zip(names, shared, strict=True)
            }
            full = self._outbox.reader().completed(legacy_lists.PARAMETERS, tensors)
            return [value.numpy() for value in full.values()]

    def _begin(self, messages: Sequence[Message]) -> None:
        """Note the first message of another kind or round: all replies to the first ones are in."""
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
            self._outbox.log_first_contacts()
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
        """Return what a node that has answered made of a record; None if no codec lost any of it.

        Args:
            node: whose last answer is meant.
            name: of the record of arrays.
        """
        return self._outbox.references.get(self._holds.get(node, {}).get(name, ""))

    def close(self) -> None:
        """End the run; references in files stay for the next one."""
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
            encoded = self._outbox.encode_message(message)
            self._first.sent(encoded)
            names = list(message.content.array_records)
            models = [name for name in names if not is_optimizer_record(name)]
            if len(models) == 1:
                self._final.sent(partial(self._outbox.content, models[0]))
            self._accounting.describe_layers(
                message, lambda: chain.from_iterable(map(self._outbox.layers, models))
            )
            self._accounting.sent(encoded, sum(map(self._outbox.size, names), Size()))
            return encoded

    def _received(self, replies: Sequence[Message]) -> tuple[list[Message], set[int]]:
        """Return the usable replies, decoded, and the nodes that lost what they held."""
        with self._lock:
            self._first.replied(replies)
            usable: list[Message] = []
            lost: set[int] = set()
            fresh = 0
            for reply in replies:
                follow(self._final, reply, "up")
                node = reply.metadata.src_node_id
                marker = None if reply.has_error() else Marker.taken_from(reply.content)
                if marker is None:
                    usable += [reply] if self._passes(reply) else []
                elif marker.lost:
                    lost.add(node)
                    self._outbox.note_reply(node, marker)
                elif self._replies.decode_in_place(reply):
                    self._first.used()
                    self._outbox.note_reply(node, marker)
                    self._holds[node] = marker.holds
                    fresh += marker.fresh
                    self._accounting.evaluated(reply)
                    usable.append(reply)
            if fresh:
                log.info("fedpara: %d clients started from the seeded private factors", fresh)
            return usable, lost

    def _passes(self, reply: Message) -> bool:
        """Return whether a reply that the plugin has not made goes on to the strategy."""
        if reply.has_error() or secagg.is_secagg(reply.content):
            return True  # with content, it is a step of the protocol that the app took no part in
        log.warning(
            "fedpara: left out node %d: its client answers without the plugin. Add to that client: "
            "%s",
            reply.metadata.src_node_id,
            ADD_MOD,
        )
        return False
