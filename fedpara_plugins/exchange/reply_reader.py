"""The gate for clients' replies: each is decoded, checked and completed, or left out.

Every reply of every adapter passes here before a strategy, a rule or an average sees it. What can
be wrong with one reply is that reply's alone: `reason_of` turns whatever was raised while it was
read into the reason for which it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fedpara_plugins.codecs import DecodedPayload, decode_payload, roll_of
from fedpara_plugins.errors import FedParaError, MismatchError, PayloadError
from fedpara_plugins.exchange.budget import MessageBudget
from fedpara_plugins.exchange.downlink_encoder import DownlinkEncoder
from fedpara_plugins.exchange.frozen import CHANGED, changed_record
from fedpara_plugins.exchange.headers import check_rows, first_model_limit, spec_of
from fedpara_plugins.exchange.outliers import update_norm
from fedpara_plugins.exchange.records import KindOf, State, plain_spec
from fedpara_plugins.exchange.reply_checks import (
    check_composed,
    check_first,
    check_own,
    check_side,
    in_sent_dtypes,
)
from fedpara_plugins.exchange.rolls import JOINT_RECORD, separated
from fedpara_plugins.exchange.sizes import Size, size_of, tensor_bytes
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references import same_layout, shared_tensors
from fedpara_plugins.text import shortened

__all__ = ["ReadRecord", "ReplyReader", "reason_of"]

MORE_RECORDS = 4
"""Records that a reply may have beyond as many as the server sends."""

MORE_TENSORS = 64
"""Tensors that a record may have beyond those of the largest record sent."""

MOST_FIRST = 4096
"""Tensors of a model that a client starts the run with, and rows of its description."""
LONGEST_REASON = 300
"""Characters of an unknown error that are repeated."""


def reason_of(error: Exception) -> FedParaError:
    """Return why one reply is left out, whatever was raised while it was read.

    Args:
        error: of this project, or one that nobody has thought of.
    """
    if isinstance(error, FedParaError):
        return error
    text = shortened(str(error), LONGEST_REASON)
    return PayloadError(f"it cannot be read: {type(error).__name__}: {text}".removesuffix(": "))


@dataclass(frozen=True)
class ReadRecord:
    """One record of a reply.

    Attributes:
        shared: what the client has sent.
        state: the same, completed with the server's own private names if it is a whole model.
        norm: of the update, if the record is a model that was sent; else None.
        size: norm of what was sent, with the same condition.
    """

    shared: State
    state: State
    norm: float | None = None
    size: float | None = None


class ReplyReader:
    """Reads one client's reply.

    A record of kind ``model`` whose name was sent holds the names that were sent, or some of them
    unless ``strict``, with their shapes, in dtypes that cast to theirs. Its values are finite where
    those sent are, after that cast and in every composed weight. A record beside the model has to
    be asked for, and holds shared names of the model. Any other record is an app's own: it is
    bounded, finite, and holds nothing private. All records share one budget of bytes.

    Args:
        sent: what the server sends; a record is compared with what was sent under its name.
        kind_of: returns the kind of a record, given its name.
        model_of: the model whose dense size the tensors of a side record are compared with.
        strict: whether a model's record must hold all names that were sent.
        asked: the records beside the model that the server has asked for.
        own: whether the reply may hold records of an app's own.

    Attributes:
        size: of everything that was decoded, refused records included.
        references: by record, the hash of what the client has received, where its payload names it
            or refers to the roll of the message.
    """

    def __init__(
        self,
        sent: DownlinkEncoder,
        *,
        kind_of: KindOf,
        model_of: Callable[[Mapping[str, Tensor]], ModelSpec | None],
        strict: bool,
        asked: Collection[str] = (),
        own: bool = True,
    ) -> None:
        self.size = Size()
        self.references: dict[str, str] = {}
        self._sent = sent
        self._kind_of = kind_of
        self._model_of = model_of
        self._strict = strict
        self._asked = frozenset(asked)
        self._own = own

    @cached_property
    def budget(self) -> MessageBudget:
        """What all records of the reply may take, together."""
        sizes = [tensor_bytes(self._sent.content(name)) for name in self._sent.records]
        return MessageBudget(max(sizes, default=0), parts=max(2, len(sizes)))

    def read_all(self, payloads: Mapping[str, bytes]) -> dict[str, ReadRecord]:
        """Read the records of a reply.

        Args:
            payloads: the bytes of each record, by its name.

        Raises:
            MismatchError: see `read`; or the reply refers to a message that was not sent.
            PayloadError: see `read`; or too many records.
        """
        most = len(self._sent.records) + MORE_RECORDS
        payloads = self._separated(payloads)
        changed = {name: data for name, data in payloads.items() if name.startswith(CHANGED)}
        records = {name: data for name, data in payloads.items() if name not in changed}
        if len(records) > most:
            raise PayloadError(f"the reply holds {len(records)} records, at most {most} are taken")
        if alone := changed.keys() - set(map(changed_record, records)):
            raise MismatchError(f"the client answers with {min(alone)[:80]!r} without its record")
        return {
            name: self.read(name, payload, changed.get(changed_record(name)))
            for name, payload in records.items()
        }

    def _separated(self, payloads: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Return the records of a reply; one payload of all says what the client has received."""
        if JOINT_RECORD not in payloads:
            return payloads
        found = separated(payloads, self._sent.rolls, limit=self.budget.left)
        self.references.update(roll_of(payloads[JOINT_RECORD], self._sent.rolls).references)
        return found

    def read(self, record: str, payload: bytes, changed: bytes | None = None) -> ReadRecord:
        """Read a record that answers what the server has sent.

        Args:
            record: its name.
            payload: its bytes.
            changed: those of the frozen buffers that the client has changed.

        Raises:
            MismatchError: names, shapes or dtypes do not fit those sent, or the record was not
                asked for.
            PayloadError: damaged, too large, or with NaN or infinity.
        """
        kind = self._kind_of(record)
        if kind != "model" and record not in self._asked:
            raise MismatchError(f"the client answers with a record {record[:80]!r} unasked")
        decoded = self._decoded(record, payload, self.budget.left)
        if decoded.header.reference is not None:
            self.references[record] = decoded.header.reference
        shared = decoded.tensors
        self.budget.spend(tensor_bytes(shared))
        if kind == "model" and self._sent.has_record(record):
            return self._read_model(record, shared, self._changed(record, changed))
        if changed is not None:
            raise MismatchError(f"record {record[:80]!r} has no buffers that are left out")
        if kind != "model":
            return self._read_side(record, shared)
        return self._read_own(record, shared)

    def read_first(self, record: str, payload: bytes) -> tuple[ModelSpec, State]:
        """Read the model that a client starts the run with; the server may have built none.

        Only for an answer that the server asked for: nothing but its own size bounds it.

        Returns:
            The model that the client describes, and its shared state.

        Raises:
            PayloadError: damaged, with NaN or infinity, or without a sound description of a model.
        """
        limit = first_model_limit(payload)
        decoded = self._decoded(record, payload, limit)
        check_rows(decoded.header, MOST_FIRST)
        spec = spec_of(decoded.header, decoded.tensors, limit=limit)
        check_first(spec, decoded.tensors)
        return spec, decoded.tensors

    def completed(self, record: str, shared: State) -> State:
        """Return a complete state, with private names filled from the server's own state.

        Strategies and rules then see in every reply the names that the server has.

        Args:
            record: its name; what was never sent under that name stays as it is.
            shared: what a client answers, after all checks: all shared names, or some of them.
        """
        if not self._sent.has_record(record):
            return shared
        if len(shared) < len(self._sent.shared_names(record)):
            return shared
        return {key: shared.get(key, value) for key, value in self._sent.content(record).items()}

    def received(self, record: str, reference: str) -> State | None:
        """Return what a client says it has received of a model; None if no codec lost any of it.

        Args:
            record: the model's name.
            reference: the hash that the client names.

        Raises:
            MismatchError: the hash is that of something else.
        """
        found = self._sent.references.get(reference)
        if found is None or not self._sent.has_record(record):
            return None
        content = self._sent.content(record)
        if not same_layout(found, {key: content[key] for key in self._sent.shared_names(record)}):
            raise MismatchError(f"the client names a state that is none of the record {record!r}")
        return found

    # One kind of record

    def _changed(self, record: str, payload: bytes | None) -> State:
        """Return frozen buffers that a client has changed."""
        if payload is None:
            return {}
        values = self._decoded(changed_record(record), payload, self.budget.left).tensors
        self.budget.spend(tensor_bytes(values))
        if unlike := values.keys() - self._sent.spec(record).buffers:
            raise MismatchError(
                f"the client answers with {min(unlike)[:80]!r} as a changed buffer of record "
                f"{record[:80]!r}, and this server left out no such buffer"
            )
        return values

    def _read_model(self, record: str, shared: State, changed: State) -> ReadRecord:
        full, names = self._sent.content(record), self._sent.shared_names(record)
        self._check_names(shared, names, self._sent.spec(record).private_keys)
        shared, changed = in_sent_dtypes(shared, full), in_sent_dtypes(changed, full)
        spec = self._sent.spec(record)
        check_composed(spec, {**{name: full[name] for name in spec.frozen}, **shared}, full)
        answered = {**shared, **changed}
        sent = {key: full[key] for key in answered}
        state = {**self.completed(record, shared), **changed}
        self._sent.note_changed(record, changed)
        return ReadRecord(answered, state, update_norm(answered, sent), self._sent.norm(record))

    def _check_names(self, shared: State, names: Collection[str], private: Collection[str]) -> None:
        unlike = sorted({*shared} ^ {*names} if self._strict else {*shared} - {*names})
        if unlike or not shared:
            hint = "; private names stay on the client" if {*unlike} & {*private} else ""
            raise MismatchError(
                f"the client answers with other names than this server sent: {unlike[:5]} "
                f"({len(unlike)} differ){hint}; build the same model on both sides"
            )

    def _read_side(self, record: str, shared: State) -> ReadRecord:
        for name in self._sent.records:
            if self._kind_of(name) == "model":
                full, names = self._sent.content(name), self._sent.shared_names(name)
                check_side(record, shared, full, names)
                return ReadRecord(shared, shared)
        raise MismatchError(f"record {record[:80]!r} belongs to a model, and none was sent")

    def _read_own(self, record: str, shared: State) -> ReadRecord:
        if not self._own:
            raise MismatchError(f"the client answers with a record {record[:80]!r} unasked")
        specs = [self._sent.spec(name) for name in self._sent.records]
        private = {key for spec in specs for key in spec.private_keys}
        like = max((len(self._sent.content(name)) for name in self._sent.records), default=0)
        check_own(record, shared, like=like, private=private)
        return ReadRecord(shared, shared)

    def _decoded(self, record: str, payload: bytes, limit: int) -> DecodedPayload:
        names = [len(self._sent.content(name)) for name in self._sent.records]
        decoded = decode_payload(
            payload,
            references=self._sent.references,
            descriptions=self._sent.descriptions,
            limit=limit,
            most_tensors=max(names) + MORE_TENSORS if names else MOST_FIRST,
        )
        self.size += self._size(record, decoded.tensors)
        return decoded

    def _size(self, record: str, tensors: State) -> Size:
        spec = self._sent.spec(record) if self._sent.has_record(record) else plain_spec(tensors)
        if self._kind_of(record) != "model":
            spec = self._model_of(tensors) or spec
        size = size_of(shared_tensors(spec, tensors), spec)
        if self._kind_of(record) == "model" and self._sent.has_record(record):
            size += Size(dense=self._sent.frozen_size(record).raw)
        return size
