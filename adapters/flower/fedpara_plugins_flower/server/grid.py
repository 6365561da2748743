"""The server side: a Grid between the strategy, which sees ordinary arrays, and the real Grid."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
from fedpara_plugins.exchange import FROZEN, JOINT_RECORD, Size
from fedpara_plugins.models import restore_infinities
from fedpara_plugins_flower.messages import legacy_lists
from fedpara_plugins_flower.messages.records import is_optimizer_record, with_content
from fedpara_plugins_flower.messages.snippets import ADD_MOD
from fedpara_plugins_flower.privacy import secagg
from fedpara_plugins_flower.privacy.clipping import check_clipped_message
from fedpara_plugins_flower.run import Run
from fedpara_plugins_flower.seams import guard_pulling
from fedpara_plugins_flower.server.accounting import Accounting
from fedpara_plugins_flower.server.final_state import FinalState
from fedpara_plugins_flower.server.first_contact import FirstContact, reads_payloads
from fedpara_plugins_flower.server.observing_grid import ForwardingGrid, follow
from fedpara_plugins_flower.server.outbox import Outbox
from fedpara_plugins_flower.server.reply_decoder import (
    ReadReply,
    ReplyDecoder,
    WithoutPluginError,
)
from fedpara_plugins_flower.server.requests import Request, Requests
from fedpara_plugins_flower.server.round_checks import RoundChecks
from fedpara_plugins_flower.server.strategy_hooks import log_own_loop

__all__ = ["CodecGrid"]

log = logging.getLogger("flwr.fedpara")

READS_PAYLOADS = (
    f"its client reads encoded messages without the plugin. Add to that client: {ADD_MOD}"
)

STARTERS = 3
"""Clients that are asked for the first weights, one after the other, until one gives them."""


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
        guard_pulling(inner)
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
        self._requests = Requests()
        self._replies = ReplyDecoder(run, self._outbox, accounting, self._requests)
        self._checks = RoundChecks(run)
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
            self._begin(plain, alone=alone)
            named = self._named(plain)
            if alone and Request.of(plain[0]).first_weights:
                usable = self._first_weights(named[0], timeout)
            else:
                usable = self._served(named, timeout)
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
            reader = self._outbox.reader(Request("train", legacy=True, masked=True))
            full = reader.completed(legacy_lists.PARAMETERS, tensors)
            # Masked numbers are clipped, and come back finite.
            sent = self._outbox.content(legacy_lists.PARAMETERS)
            full = restore_infinities(full, sent)
            return [value.numpy() for value in full.values()]

    def _begin(self, messages: Sequence[Message], *, alone: bool) -> None:
        """Note the first message of another kind or round: all replies to the first ones are in."""
        for message in messages[:1]:
            place = (message.metadata.message_type, message.metadata.group_id)
            with self._lock:
                if self._place not in (None, place):
                    self._first.check()
                if self._place != place or not alone:
                    self._checks.begin()
                self._place = place

    def _served(self, plain: Sequence[Message], timeout: float | None) -> list[Message]:
        usable, lost = self._exchange(plain, timeout)
        if lost:
            repeated = [message for message in plain if message.metadata.dst_node_id in lost]
            more, lost = self._exchange(repeated, timeout)
            usable += more
            self._log_lost(lost)
        with self._lock:
            self._outbox.log_first_contacts()
        return usable

    def _first_weights(self, message: Message, timeout: float | None) -> list[Message]:
        """Ask a client for the first weights, and others if it gives none that can be used.

        Raises:
            FedParaError: why the last one's cannot, if the plugin is the reason.
        """
        asked = message.metadata.dst_node_id
        others = [node for node in self._inner.get_node_ids() if node != asked]
        usable: list[Message] = []
        for node in [asked, *others][:STARTERS]:
            usable = self._served([with_content(message, message.content, node=node)], timeout)
            if any(not reply.has_error() for reply in usable):
                return usable
        if not usable:
            self._first.check_first_weights()
        return usable

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Encode and push; the legacy strategies' way."""
        with self._lock:
            self._checks.begin()
        return self._inner.push_messages([self._sent(m) for m in self._named(messages)])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull and decode; the legacy strategies' way."""
        usable, lost = self._received(list(self._inner.pull_messages(message_ids)))
        self._log_lost(lost)
        with self._lock:
            if not self._requests.any_left:
                self._first.check_plugin()
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
        received = self._received(replies)
        with self._lock:
            nodes = {message.metadata.dst_node_id for message in sent}
            self._requests.give_up(nodes)
            for node in sorted(nodes - answered):
                log.warning("fedpara: node %d has not answered in time and is left out", node)
        return received

    def _named(self, messages: Iterable[Message]) -> list[Message]:
        with self._lock:
            plain = list(messages)
            for message in plain:
                secagg.check_settings(message, self._run.settings)
                check_clipped_message(message, self._run.settings)
            return [self._namer.named(message) for message in plain]

    def _sent(self, message: Message) -> Message:
        with self._lock:
            if not legacy_lists.is_legacy(message):
                log_own_loop(self._run)
            encoded = self._outbox.encode_message(message)
            self._requests.note(message)
            self._first.sent(encoded)
            names = list(message.content.array_records)
            models = [name for name in names if not is_optimizer_record(name)]
            if len(models) == 1:
                self._final.sent(partial(self._outbox.content, models[0]))
            self._accounting.describe_layers(
                message, lambda: chain.from_iterable(map(self._outbox.layers, models))
            )
            once = encoded.content.array_records.keys() - {*names, JOINT_RECORD}
            sizes = [*map(self._outbox.size, names)]
            sizes += [self._outbox.frozen_size(name.removeprefix(FROZEN)) for name in once]
            self._accounting.sent(encoded, sum(sizes, Size()))
            return encoded

    def _received(self, replies: Sequence[Message]) -> tuple[list[Message], set[int]]:
        """Return the usable replies, decoded, and the nodes that lost what they held."""
        with self._lock:
            read = [self._read(reply) for reply in replies]
            read = self._without_plain_errors(read)
            lost = {each.node for each in read if each.marker is not None and each.marker.lost}
            usable = self._checks.usable([r for r in read if not r.reason and r.node not in lost])
            for each in read:
                if isinstance(each.reason, WithoutPluginError) and each.message.has_error():
                    self._leave_out(each, each.reason)
            self._run.left_out += len(read) - len(lost) - len(usable)
            fresh = sum(each.marker.fresh for each in usable if each.marker is not None)
            if fresh:
                log.info("fedpara: %d clients started from the seeded private factors", fresh)
            for each in usable:
                if each.marker is not None:
                    self._accounting.evaluated(each.message)
            if replies and not usable and not lost:
                log.error(
                    "fedpara: none of %d replies can be used: this round changes nothing",
                    len(replies),
                )
            return [each.message for each in usable], lost

    def _without_plain_errors(self, read: Sequence[ReadReply]) -> list[ReadReply]:
        """Leave out errors of clients that lack the plugin, where others have it, and say so.

        A strategy would log each error whole, in each round.
        """
        if not self._first.met:
            return list(read)
        return [
            replace(each, reason=WithoutPluginError(READS_PAYLOADS))
            if each.message.has_error() and reads_payloads(each.message.error.reason or "")
            else each
            for each in read
        ]

    def _read(self, reply: Message) -> ReadReply:
        """Read a reply, and note what follows from it for the next messages."""
        read = self._replies.read(reply)
        if read.reason is not None:
            self._leave_out(read, read.reason)
            return read
        follow(self._final, reply, "up")
        if reply.has_error():
            self._outbox.note_failure(str(read.node))
            self._first.failed(read.node, reply.error.code, reply.error.reason or "")
        elif read.marker is not None:
            if not read.marker.lost:
                self._first.used()
                self._holds[read.node] = read.marker.holds
            self._outbox.note_reply(read.node, read.marker)
        return read

    def _leave_out(self, read: ReadReply, reason: FedParaError) -> None:
        text = str(reason).removeprefix("fedpara: ")
        if isinstance(reason, WithoutPluginError):
            log.warning("fedpara: left out node %d: %s", read.node, text)
            self._first.without_plugin(read.node)
            return
        log.warning("fedpara: left out the reply of node %d: %s", read.node, text)
        if read.request is not None:  # else nobody was asked
            self._first.left_out(read.node, text)

    def _log_lost(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            log.warning("fedpara: node %d lost its state and sits out this round", node)
