"""One round of one client: decode the message, run the user's code, encode the reply.

    client_round = ClientRound(settings, state, own=own, kind_of=kind_of)
    received = client_round.receive(payloads)             # LostReferenceError: see `known_hashes`
    answered = ...(received["model"].user_tensors)        # the user's code
    leaving = client_round.prepare_reply({"model": answered})    # what may leave the device
    payloads = client_round.encode(leaving)
    client_round.keep()                                   # nothing has changed before this line

Adapters carry the payloads, call the user's code, and commit the client's storage.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from fedpara_plugins.codecs import (
    HeaderForm,
    LostDescriptionError,
    PayloadHeader,
    decode_payload,
    encode_payload,
    parse_codec,
    peek_header,
    readable,
)
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.exchange.budget import MessageBudget
from fedpara_plugins.exchange.client_state import ClientState, PrivateParts
from fedpara_plugins.exchange.coding import CodedRecord, encode_record, update_codec
from fedpara_plugins.exchange.dense_round import DenseRound
from fedpara_plugins.exchange.frozen import FROZEN, changed_record, frozen_record, tensor_hash
from fedpara_plugins.exchange.frozen_source import FrozenSource, OwnStates
from fedpara_plugins.exchange.headers import (
    check_codecs,
    check_rows,
    decoders_of,
    first_model_limit,
    plans_of,
    reply_form,
)
from fedpara_plugins.exchange.incoming import ReceivedRecord, read_model, read_side
from fedpara_plugins.exchange.outgoing import Outgoing, select_outgoing
from fedpara_plugins.exchange.own_models import OwnModels
from fedpara_plugins.exchange.records import KindOf, State
from fedpara_plugins.exchange.rolls import (
    JOINT_RECORD,
    answered_roll,
    joined,
    reads_joint,
    separated,
)
from fedpara_plugins.exchange.settings import ExchangeSettings
from fedpara_plugins.exchange.sizes import tensor_bytes
from fedpara_plugins.models.infinities import check_finite, without_nan
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references import DecodedDownlink, LostReferenceError

__all__ = ["ClientRound", "OnEncoded"]

log = logging.getLogger("fedpara")

OnEncoded = Callable[[Mapping[str, State]], None]
"""Called with what the codec lost of each record: the tensors given minus those that the server
will decode."""

REMEDY = "Set the same fedpara option codec on both sides"

MOST_RECORDS = 64
"""Records of arrays in one message; apps have a handful."""

MORE_TENSORS = 64
"""Tensors of a record beyond those of the largest own model: each takes some 0.1 ms, however small
it is."""

FEW_TENSORS, MOST_TENSORS = 256, 4096
"""Tensors of a record as long as no own model is known, and if none will be."""

MOST_UNBUILT = 4 * MOST_TENSORS
"""Rows of a description, and frozen tensors that travel once, as long as no own model is known."""


class ClientRound:
    """The processing of one message on a client, and of the reply to it.

    Args:
        settings: of the run.
        state: what the client keeps; changed by `keep` alone.
        own: the client's own models, as far as they are known.
        kind_of: returns the kind of a record, given its name.
        parts: states of the model's size that a message may hold (`MessageBudget`).
        remedy: the sentence that says where a user sets the codec.
        states: returns the models that the client's own code has built, for their frozen tensors.

    Attributes:
        received: what `receive` returned.
    """

    def __init__(
        self,
        settings: ExchangeSettings,
        state: ClientState,
        *,
        own: OwnModels,
        kind_of: KindOf,
        parts: int = 2,
        remedy: str = REMEDY,
        states: OwnStates = tuple,
    ) -> None:
        self.received: Mapping[str, ReceivedRecord] = {}
        self._settings = settings
        self._state = state
        self._kind_of = kind_of
        self._own = own
        self._parts = parts
        self._remedy = remedy
        self._asked: tuple[str, ...] = ()
        self._private = PrivateParts()
        self._residuals: dict[str, State] = {}
        self._named: set[str] = set()
        self._joined = False
        self._sent_once: dict[str, State] = {}
        self._frozen = FrozenSource(states, self._frozen_copy)

    # In

    def separate(self, payloads: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return the records of a message, which may travel in one payload.

        Args:
            payloads: as they came.

        Raises:
            LostReferenceError: the client does not hold the roll that the payload refers to.
            PayloadError: damaged.
        """
        limit = MessageBudget(self._own.nbytes, parts=self._parts).left if self._own else None
        try:
            return separated(payloads, self._state.rolls(), limit=limit)
        except LostDescriptionError as error:
            self._asked = (JOINT_RECORD,)  # whatever was in it
            raise LostReferenceError(str(error)) from error

    def receive(
        self, payloads: Mapping[str, bytes], *, unbounded: bool = False
    ) -> Mapping[str, ReceivedRecord]:
        """Decode a message with what the client keeps.

        Its tensors may take what the client's own models allow, and 4 MiB as long as none is known.

        Args:
            payloads: by name of the record; frozen tensors that travel once are in one of their own
                (`frozen_record`).
            unbounded: whether the app reads the message before it builds a model, so that nothing
                of its own says how large the message may be.

        Raises:
            LostReferenceError: the client does not hold what the message was coded against.
            ConfigError: the server has other codecs.
            MismatchError: the server's model differs from this client's, or from its options.
            TooLargeError: the message is larger than this client's models allow.
            PayloadError: a payload is damaged.
        """
        payloads = self.separate(payloads)
        once = {name: data for name, data in payloads.items() if name.startswith(FROZEN)}
        payloads = self._without_frozen(payloads)
        if len(payloads) > MOST_RECORDS:
            raise PayloadError(
                f"fedpara: the message has {len(payloads)} records of arrays, expected at most "
                f"{MOST_RECORDS}"
            )
        budget = MessageBudget(self._own.nbytes, parts=self._parts)
        if unbounded:
            most = max(map(first_model_limit, payloads.values()), default=0)
            budget = MessageBudget(most, parts=1)
        self._sent_once = self._copies(
            {name: once[frozen_record(name)] for name in payloads if frozen_record(name) in once}
        )
        most = self._most_tensors(MOST_TENSORS if unbounded else FEW_TENSORS)
        held = {name: self._decoded(name, data, budget, most) for name, data in payloads.items()}
        self.received = {name: self._read(name, part, budget) for name, part in held.items()}
        return self.received

    def described_plans(self, payloads: Mapping[str, bytes]) -> list[ModelSpec]:
        """Return the factorised weights that a message describes, without decoding a tensor.

        Args:
            payloads: by name of the record.

        Returns:
            Specs that hold weights alone, for `models.adopt_plans`.

        Raises:
            LostReferenceError: a header refers to a description that the client does not hold.
            PayloadError: a payload is damaged.
        """
        payloads = self._without_frozen(self.separate(payloads))
        names = [name for name in payloads if self._kind_of(name) == "model"]
        try:
            headers = [self._header(name, payloads[name]) for name in names]
        except LostDescriptionError as error:
            raise LostReferenceError(str(error)) from error
        for header in headers:
            check_rows(header, self._most_tensors(MOST_UNBUILT))
        return [plans_of(header) for header in headers]

    def _without_frozen(self, payloads: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Return a message's records without those of frozen tensors, and note their names."""
        found = {name: data for name, data in payloads.items() if not name.startswith(FROZEN)}
        self._asked = tuple(found)
        return found

    def _most_tensors(self, unknown: int) -> int:
        """Return the tensors that a record may have: ``unknown`` if no own model is known."""
        known = [len(spec.keys) + MORE_TENSORS for spec in self._own.specs]
        return max(known, default=unknown)

    def _header(self, name: str, payload: bytes) -> PayloadHeader:
        return peek_header(payload, descriptions=self._state.references.descriptions(name))

    def _decoded(
        self, name: str, payload: bytes, budget: MessageBudget, most: int
    ) -> DecodedDownlink:
        with contextlib.suppress(LostDescriptionError):  # `receive` says so in the sender's terms
            check_rows(self._header(name, payload), most)
        held = self._state.references.receive(
            name,
            payload,
            limit=budget.left,
            own=self._own.specs,
            most_tensors=most,
            working=budget.working,
        )
        budget.spend(tensor_bytes(held.tensors))
        check_codecs(held.header, self._settings.codec_names, remedy=self._remedy)
        return held

    def _copies(self, payloads: Mapping[str, bytes]) -> dict[str, State]:
        """Return frozen tensors that travel once, by record; they are checked by their hashes."""
        first = max(map(first_model_limit, payloads.values()), default=0)
        own = self._own.nbytes
        budget = MessageBudget(own) if own else MessageBudget(first, parts=1)
        most = self._most_tensors(MOST_UNBUILT)
        found = {}
        for name, data in payloads.items():
            found[name] = decode_payload(data, limit=budget.left, most_tensors=most).tensors
            budget.spend(tensor_bytes(found[name]))
        return found

    def _frozen_copy(self, record: str) -> State:
        return {**self._state.frozen(record), **self._sent_once.get(record, {})}

    def _read(self, name: str, held: DecodedDownlink, budget: MessageBudget) -> ReceivedRecord:
        if self._kind_of(name) != "model":
            return read_side(held)
        return read_model(
            held,
            state=self._state,
            settings=self._settings,
            own=self._own,
            budget=budget,
            frozen=lambda spec: self._frozen.values(name, spec, held.tensors),
        )

    @property
    def previous_steps(self) -> int | None:
        """Optimizer steps of the last round that this client trained; None before the first."""
        return self._state.steps()

    # What a reply states besides the payloads

    def known_hashes(self) -> dict[str, tuple[str, ...]]:
        """Return, by record of the message, the hashes of what the client holds of it.

        A payload of all records that cannot be separated counts as one record, of which it holds
        nothing.
        """
        return {name: self._state.references.holds(name) for name in self._asked}

    @property
    def received_hashes(self) -> dict[str, str]:
        """By record, the hash of what the client has received.

        Where the server is known to read version 2 of headers, those are left out that a payload of
        the reply names itself, and all where one payload refers to the message as a whole:
        `ReplyReader.references` has them.
        """
        if self._joined:
            return {}
        hashes = {name: part.held.reference for name, part in self.received.items()}
        if not self._is_known:
            return hashes
        return {name: value for name, value in hashes.items() if name not in self._named}

    @property
    def decoders(self) -> tuple[str, ...]:
        """What this side decodes, for the server; () where its message shows that it knows."""
        return () if self._is_known else readable()

    @property
    def _is_known(self) -> bool:
        """Whether the server has heard what this client decodes: it wrote version 2."""
        return bool(self.received) and all(
            part.held.header.version > 1 for part in self.received.values()
        )

    @property
    def fresh(self) -> bool:
        """Whether the client started from the seeded private values."""
        return any(part.fresh for part in self.received.values())

    # Out

    @property
    def models(self) -> list[ReceivedRecord]:
        """The records received that are models, in order."""
        return [part for name, part in self.received.items() if self._kind_of(name) == "model"]

    def prepare_reply(
        self,
        records: Mapping[str, Mapping[str, Tensor]],
        *,
        start: DenseRound | None = None,
        noisy: bool = False,
    ) -> dict[str, Outgoing]:
        """Check the tensors that the user's code returns, and take out what stays on the device.

        Args:
            records: the tensors by name of the record.
            start: the dense round of a reply to a message without a model.
            noisy: whether noise was added to all tensors, frozen ones too.

        Raises:
            PayloadError: values that became NaN or infinite, a private tensor in a side record, or
                two private states of one model.
            MismatchError: names or shapes that the model does not have, the model that was received
                is none of this client's, or what is frozen on the server has been trained.
            ConfigError: the client's code has built no model, and there may be private values.
        """
        return {name: self._leaving(name, each, start, noisy) for name, each in records.items()}

    def _leaving(
        self, name: str, tensors: Mapping[str, Tensor], start: DenseRound | None, noisy: bool
    ) -> Outgoing:
        self._check_finite(name, tensors)
        kind = self._kind_of(name)
        if kind != "model":
            return select_outgoing(name, tensors, self._own, kind=kind)
        part = self._counterpart(name)
        dense = start if part is None else part.dense
        if dense is not None:  # the state of factors that the trained weights stand for
            tensors = dense.to_factors(tensors)
            self._check_finite(name, tensors)
        answered = self.received.get(name)
        leaving = select_outgoing(
            name, tensors, self._own, received=None if answered is None else answered.spec
        )
        if answered is not None:
            if not noisy:
                _check_frozen(answered, tensors)
            self._private.add(name, leaving.spec, tensors)
        if noisy:  # there is no telling what has changed
            return replace(leaving, changed={})
        return leaving

    def _check_finite(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Raise for values that became NaN or infinite since they were received.

        Where no model was received, the tensors are a model's first ones, and may hold infinities.
        """
        sent: Mapping[str, Tensor] = {}
        if self._kind_of(name) == "model":
            part = self._counterpart(name)
            sent = without_nan(tensors) if part is None else {**part.full, **part.user_tensors}
        check_finite(tensors, sent, config=self._settings.config)

    def encode(
        self, leaving: Mapping[str, Outgoing], *, on_encoded: OnEncoded | None = None
    ) -> dict[str, bytes]:
        """Return the payloads of a reply, by record; one of all records if the server reads that.

        Args:
            leaving: what `prepare_reply` returned, or the part of it that is to be encoded.
            on_encoded: called when everything is encoded and nothing has been kept yet.

        Raises:
            PayloadError: a tensor cannot be encoded.
        """
        with_loss = on_encoded is not None
        coded = {name: self._coded(name, part, with_loss) for name, part in leaving.items()}
        changed = {name: part.changed for name, part in leaving.items() if part.changed}
        if on_encoded is not None:
            on_encoded({name: part.lost for name, part in coded.items()})
        payloads = {name: part.payload for name, part in coded.items()}
        tensors = {name: len(part.shared) for name, part in leaving.items()}
        for name, values in changed.items():
            log.info(
                "fedpara: this client has changed %d buffers of record %r that are not part of "
                "messages (the first is %r): their values are sent", len(values), name, min(values),
            )  # fmt: skip
            payloads[changed_record(name)] = self._coded_buffers(name, values)
            tensors[changed_record(name)] = len(values)
        roll = answered_roll(self.received)
        if roll is None or not reads_joint(self.received):
            return payloads
        found = joined(payloads, roll, tensors)
        self._joined = found.keys() != payloads.keys()
        return found

    def _coded_buffers(self, name: str, values: State) -> bytes:
        """Return changed buffers as they are."""
        told = self._counterpart(name)
        decoders = None if told is None else decoders_of(told.held.header)
        form = None if told is None or reply_form(told.held) is None else HeaderForm()
        codec = parse_codec("lossless").resolved(decoders)
        return encode_payload(values, codec=codec.first_contact(), form=form)

    def _coded(self, name: str, leaving: Outgoing, with_loss: bool) -> CodedRecord:
        part, told = self.received.get(name), self._counterpart(name)
        codec = self._settings.uplink.resolved(
            None if told is None else decoders_of(told.held.header)
        )
        if self._kind_of(name) == "update":
            codec = update_codec(codec)
        coded = encode_record(
            leaving,
            codec=codec,
            received=None if part is None else part.held,
            residual=self._state.residual(name) if codec.feedback else None,
            with_loss=with_loss,
            form=reply_form(None if told is None else told.held),
        )
        if coded.reference is not None:
            self._named.add(name)
        if codec.feedback:
            self._residuals[name] = coded.residual
        return coded

    def _counterpart(self, name: str) -> ReceivedRecord | None:
        """Return the record received under a name, else the first model received."""
        return self.received.get(name) or next(iter(self.models), None)

    def keep(self, *, steps: int = 0) -> None:
        """Put what this round changes into the client's state, for the caller to commit.

        Args:
            steps: optimizer steps of the round; 0 if nothing was trained.
        """
        self._private.keep(self._state)
        for name, tensors in self._sent_once.items():
            frozen = self.received[name].spec.frozen
            self._state.keep_frozen(name, {k: v for k, v in tensors.items() if k in frozen})
        self._state.remember(self._own.built, self._settings.config)
        for name, residual in self._residuals.items():
            self._state.keep_residual(name, residual)
        for name, part in self.received.items():
            if self._settings.downlink.needs_reference:
                self._state.references.keep(name, part.held)
            else:
                self._state.references.keep_description(name, part.held)
        if (roll := answered_roll(self.received)) is not None:
            self._state.keep_roll(roll)
        self._state.keep_few({*self.received, *self._residuals})
        self._state.keep_steps(steps)


def _check_frozen(answered: ReceivedRecord, tensors: Mapping[str, Tensor]) -> None:
    """Raise if the user's code has changed what is frozen on the server, and is not sent."""
    for name, digest in answered.spec.frozen.items():
        # What was received may lie in the memory of the model that was trained: hashes tell.
        if name in answered.spec.buffers:
            continue  # it is sent
        if name in tensors and tensor_hash(name, tensors[name]) != digest:
            raise MismatchError(
                f"fedpara: this client has changed {name!r}, which is frozen on the server and so "
                f"not sent: freeze the same parameters on both sides (requires_grad=False before "
                f'the first message), or set the fedpara option send = "all"'
            )
