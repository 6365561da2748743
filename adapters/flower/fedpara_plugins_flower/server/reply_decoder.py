"""The gate for replies: each is read to ordinary arrays, or left out with its reason."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from fedpara_plugins import FedParaError, MismatchError, PayloadError
from fedpara_plugins.exchange import (
    JOINT_RECORD,
    ReadRecord,
    ReplyReader,
    Size,
    changed_record,
    reason_of,
    server_state,
)
from fedpara_plugins_flower.messages import legacy_lists
from fedpara_plugins_flower.messages.drift_records import OPTIMIZER
from fedpara_plugins_flower.messages.records import carried_payload, to_record
from fedpara_plugins_flower.messages.reply_marker import Marker
from fedpara_plugins_flower.messages.snippets import ADD_MOD
from fedpara_plugins_flower.privacy import secagg
from fedpara_plugins_flower.run import Run
from fedpara_plugins_flower.seams import unreadable
from fedpara_plugins_flower.server.accounting import Accounting
from fedpara_plugins_flower.server.outbox import Outbox
from fedpara_plugins_flower.server.reply_forms import StrategyKeys, check_values, value_bytes
from fedpara_plugins_flower.server.requests import Request, Requests
from fedpara_plugins_flower.server.strategy_arrays import averageable, warn_about_integers

__all__ = ["ReadReply", "ReplyDecoder", "WithoutPluginError"]

log = logging.getLogger("flwr.fedpara")


class WithoutPluginError(FedParaError):
    """A client answers without the plugin."""


@dataclass(frozen=True)
class ReadReply:
    """One reply, after the gate.

    Attributes:
        message: the reply, with ordinary arrays.
        request: what it answers; None if that is not known.
        marker: of the client; None if an error or a step of secure aggregation came instead.
        reason: why it is left out; None if it is not.
        norm: of its update; None if it has none.
        size: norm of what was sent.
    """

    message: Message
    request: Request | None = None
    marker: Marker | None = None
    reason: FedParaError | None = None
    norm: float | None = None
    size: float = 0.0

    @property
    def node(self) -> int:
        """The client's node."""
        found: int = self.message.metadata.src_node_id
        return found


@dataclass
class _Progress:
    """What is known of a reply while it is read."""

    request: Request | None = None
    size: Size = field(default_factory=Size)
    references: Mapping[str, str] = field(default_factory=dict)


class ReplyDecoder:
    """Reads replies for the strategy, and counts them.

    Args:
        run: the run's settings and the models built in it.
        outbox: what the server sends.
        accounting: where the bytes are counted.
        requests: what the server has asked for.
    """

    def __init__(
        self, run: Run, outbox: Outbox, accounting: Accounting, requests: Requests
    ) -> None:
        self._run = run
        self._outbox = outbox
        self._accounting = accounting
        self._requests = requests
        self._told_integers = False

    def read(self, reply: Message) -> ReadReply:
        """Read a reply, whose sender is not trusted; whatever goes wrong is its own reason."""
        known = _Progress()
        if reply.has_error() and reply.metadata.src_node_id == reply.metadata.dst_node_id:
            return ReadReply(reply)  # the SuperLink's own, for a node that is gone
        try:
            known.request = self._requests.take(reply)
            if (why := unreadable(reply)) is not None:
                raise PayloadError(why)
            return self._read(reply, known)
        except Exception as error:  # whatever it is, it is this reply's alone
            return ReadReply(reply, known.request, reason=reason_of(error))

    def _read(self, reply: Message, known: _Progress) -> ReadReply:
        request = known.request
        assert request is not None
        if reply.has_error():
            return ReadReply(reply, request)
        marker = Marker.taken_from(reply.content, records=len(self._outbox.records))
        if marker is None:
            _check_step(reply, request)
            return ReadReply(reply, request)
        if marker.lost:
            return ReadReply(reply, request, marker)
        try:
            content, found = self._decoded(reply, request, known)
        finally:
            self._count(reply, known.size)
        # A reply does not repeat the hashes that its payloads name.
        marker = replace(marker, holds={**known.references, **marker.holds})
        for name, reference in marker.holds.items():
            self._outbox.reader(request).received(name, reference)
        reply.content = content
        norms = [each for each in found if each.norm is not None]
        return ReadReply(
            reply,
            request,
            marker,
            norm=max((each.norm or 0.0 for each in norms), default=None),
            size=max((each.size or 0.0 for each in norms), default=0.0),
        )

    def _decoded(
        self, reply: Message, request: Request, known: _Progress
    ) -> tuple[RecordDict, list[ReadRecord]]:
        content = RecordDict(dict(reply.content.items()))
        _check_records(content, request)
        check_values(content, StrategyKeys.of(self._run.strategy))
        payloads = {
            name: _payload(name, record)
            for name, record in content.array_records.items()
            if not _may_be_empty(name, record, request, sent=self._outbox.has_record(name))
        }
        reader = self._outbox.reader(request)
        if not request.masked:
            reader.budget.spend(value_bytes(content))
        found: list[ReadRecord] = []
        try:
            if request.first_weights:
                for name, payload in payloads.items():
                    content[name] = to_record(self._first_weights(reader, name, payload))
            else:
                read = reader.read_all(payloads)
                for name in payloads.keys() - read.keys():  # one of all records, changed buffers
                    del content[name]
                for name, record in read.items():
                    self._warn_once(record.shared)
                    content[name] = to_record(averageable(record.state))
                    found.append(record)
        finally:
            known.size, known.references = reader.size, reader.references
        legacy_lists.unname_reply(content, request.kind)
        return content, found

    def _first_weights(self, reader: ReplyReader, name: str, payload: bytes) -> dict[str, Tensor]:
        """Return the model that a client starts the run with; the server may have built none."""
        spec, shared = reader.read_first(name, payload)
        self._warn_once(shared)
        mine = self._run.specs.get(frozenset(spec.keys), spec)
        mine.check_equal(spec, here="the server", there="the client that was asked to start")
        state = server_state(spec, shared)
        self._run.specs.setdefault(frozenset(spec.keys), spec)
        return state

    def _count(self, reply: Message, size: Size) -> None:
        """Enter a reply into the ledger, as it has travelled."""
        if secagg.is_secagg(reply.content):
            size += self._masked(reply)
        self._accounting.received(reply, size)

    def _masked(self, reply: Message) -> Size:
        """Return the size behind masked lists: the shared part of what the client received."""
        empty = sum(map(legacy_lists.carries_nothing, reply.content.array_records.values()))
        if not self._outbox.has_record(legacy_lists.PARAMETERS):
            return Size()
        return sum([self._outbox.size(legacy_lists.PARAMETERS)] * empty, Size())

    def _warn_once(self, tensors: Mapping[str, Tensor]) -> None:
        if not self._told_integers:
            self._told_integers = True
            warn_about_integers(tensors, self._run.strategy)


def _check_step(reply: Message, request: Request) -> None:
    """Raise unless a reply that the plugin has not made is a step of secure aggregation.

    Raises:
        WithoutPluginError: it is none: the client lacks the plugin.
        MismatchError: it is one, and holds arrays, which only the app's own step has.
    """
    if not (request.masked and secagg.is_secagg(reply.content)):
        raise WithoutPluginError(
            f"its client answers without the plugin. Add to that client: {ADD_MOD}"
        )
    if reply.content.array_records:
        raise MismatchError("it answers a step of secure aggregation with arrays of its own")


def _check_records(content: RecordDict, request: Request) -> None:
    """Raise for records that were not asked for."""
    if secagg.is_secagg(content) and not request.masked:
        raise MismatchError("it answers as a step of secure aggregation, and was asked for none")
    if OPTIMIZER in content and not request.reports:
        raise MismatchError(f"it answers with a record {OPTIMIZER!r} unasked")
    if request.legacy:
        names = {legacy_lists.PARAMETERS, changed_record(legacy_lists.PARAMETERS), JOINT_RECORD}
        if request.masked:
            names |= set(legacy_lists.LEGACY_REPLIES.values())
        if request.kind in legacy_lists.LEGACY_REPLIES and not content.array_records:
            raise PayloadError("it holds no arrays")
        empty = {n for n, r in content.array_records.items() if legacy_lists.carries_nothing(r)}
        allowed = names | (empty if request.first_weights else set())
        if unlike := content.array_records.keys() - allowed:
            raise MismatchError(f"it answers with arrays {sorted(unlike)[0][:80]!r} unasked")


def _may_be_empty(name: str, record: ArrayRecord, request: Request, *, sent: bool) -> bool:
    """Return whether a record holds nothing, and nothing had to be in it.

    Raises:
        PayloadError: it holds nothing where a model had to be.
    """
    if not legacy_lists.carries_nothing(record):
        return False
    if request.masked or request.first_weights or (not sent and not len(record)):
        return True
    raise PayloadError(f"record {name[:80]!r} holds no values")


def _payload(name: str, record: ArrayRecord) -> bytes:
    payload = carried_payload(record)
    if payload is None:
        raise PayloadError(
            f"record {name[:80]!r} carries no payload, or one that was changed on its way: no mod "
            f"may stand before fedpara.client_mod that changes arrays"
        )
    return payload
