"""The client's side of references: the states that it holds, and the error if one is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedpara_plugins.codecs import (
    Description,
    LostDescriptionError,
    PayloadHeader,
    encode_payload,
    reference_hash,
)
from fedpara_plugins.codecs.agreement import check_model
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.codecs.payload import open_payload
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references.version_zero import (
    CostlyDrawError,
    DerivedReference,
    reference_from_header,
)
from fedpara_plugins.stages.handed_over import working_limit
from fedpara_plugins.stages.stage import Tensors

__all__ = ["ClientReferences", "DecodedDownlink", "LostReferenceError"]

LAST = "last"
BEFORE = "before"
DESCRIPTION = "description"


class LostReferenceError(MismatchError):
    """A sound message refers to a state or a description that this client does not hold.

    Attributes:
        holds: the states that it holds, by hash, for the server's ``refused``.
    """

    def __init__(self, message: str, holds: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.holds = holds


@dataclass(frozen=True)
class DecodedDownlink:
    """One downlink message, decoded.

    Attributes:
        tensors: the shared state.
        reference: its hash, which the client's answer names.
        header: the payload's header.
    """

    tensors: Tensors
    reference: str
    header: PayloadHeader


class ClientReferences:
    """What a client holds of each record: the last state, and the one it was coded against.

    Both are needed: a server that never received the answer codes its next message against the
    older state. Beside them stands the record's last description, to which headers refer. Nothing
    changes before `keep`, so a round that fails leaves no trace.

    Args:
        storage: bytes by key that survive between rounds in the framework at hand; by default a
            dict that lives as long as this object.
    """

    def __init__(self, storage: MutableMapping[str, bytes] | None = None) -> None:
        self._storage: MutableMapping[str, bytes] = {} if storage is None else storage

    def holds(self, record: str) -> tuple[str, ...]:
        """Return the hashes of the states that are held of a record, the last one first."""
        hashes = (self._hash(key) for key in self._keys(record))
        return tuple(dict.fromkeys(found for found in hashes if found is not None))

    def receive(
        self,
        record: str,
        payload: bytes,
        *,
        limit: int,
        expect: ModelSpec | None = None,
        own: Sequence[ModelSpec] = (),
        most_tensors: int | None = None,
        working: int | None = None,
    ) -> DecodedDownlink:
        """Decode a downlink message.

        Args:
            record: the record's name.
            payload: the bytes.
            limit: largest size of the state in bytes.
            expect: this side's model, if it is known; a message that describes another model is
                refused before anything is derived or decoded.
            own: this side's models, one of which it may be: version 0 of such a one is drawn
                however long that takes.
            most_tensors: number of tensors that there may be, as for `decode_payload`.
            working: bytes that all of this may take; one and a half times the limit, and 10 MiB, if
                None.

        Raises:
            MismatchError: the message is of another model than expected.
            LostReferenceError: the state or the description is missing; do no work and answer with
                the error's ``holds``, so that the server sends the message again.
            PayloadError: the payload is damaged or exceeds the limit.
        """
        try:
            opened = open_payload(
                payload,
                limit=limit,
                most_tensors=most_tensors,
                descriptions=self.descriptions(record),
            )
        except LostDescriptionError as error:
            raise LostReferenceError(f"record {record!r}: {error}", self.holds(record)) from error
        header = opened.header
        if expect is not None:
            check_model(header, expect)
        working = working_limit(limit) if working is None else working
        references: Mapping[str, Tensors] = {}
        if header.reference is not None:
            known = expect or _described(header, own)
            derived = self._derived(record, header, limit, working, known)
            if derived is None:
                references = self._held(record, header.reference)
            else:
                references = {derived.reference: derived.tensors}
                working -= derived.nbytes
            if header.reference not in references:
                what = "a reference" if derived is None else "version 0"
                found = [] if derived is None else [derived.reference]
                raise self._lost(record, header.reference, what, found)
        tensors = opened.decode(references=references, working=working).tensors
        return DecodedDownlink(tensors, reference_hash(tensors), header)

    def _derived(
        self,
        record: str,
        header: PayloadHeader,
        limit: int,
        working: int,
        known: ModelSpec | None,
    ) -> DerivedReference | None:
        """Return the state that a message describes, if it describes one."""
        try:
            return reference_from_header(
                header.extra, header.model, limit=limit, expect=known, working=working
            )
        except CostlyDrawError as error:
            # The server then sends what needs no draw.
            raise LostReferenceError(f"record {record!r}: {error}", self.holds(record)) from error

    def _held(self, record: str, wanted: str) -> Mapping[str, Tensors]:
        """Return the held state of this hash, which is loaded when it is looked up.

        Raises:
            LostReferenceError: none has it.
        """
        known = []
        for key in self._keys(record):  # one state in memory at a time
            found = self._hash(key)
            if found == wanted:
                return _StoredState(wanted, partial(self._state, key))
            known += [] if found is None else [found]
        raise self._lost(record, wanted, "a reference", known)

    def _lost(
        self, record: str, wanted: str, what: str, known: Sequence[str]
    ) -> LostReferenceError:
        return LostReferenceError(
            f"record {record!r} is coded against {what} {wanted[:16]}, this client holds "
            f"{', '.join(name[:16] for name in known) or 'none'}; the server must send it again, "
            "coded against a state that the client holds",
            self.holds(record),
        )

    def descriptions(self, record: str) -> dict[str, Description]:
        """Return the description that is held of a record, by its hash; empty for none."""
        stored = self._storage.get(f"{record}/{DESCRIPTION}")
        known = None if stored is None else Description.from_bytes(stored)
        return {} if known is None else {known.digest: known}

    def keep_description(self, record: str, received: DecodedDownlink) -> None:
        """Hold the received record's description, so that later headers may refer to it."""
        new = Description.of(received.header.model, received.tensors)
        if new.digest not in self.descriptions(record):
            self._storage[f"{record}/{DESCRIPTION}"] = new.to_bytes()

    def keep(self, record: str, received: DecodedDownlink) -> None:
        """Hold the received state, and the one it was coded against if that was held."""
        self.keep_description(record, received)
        against = received.header.reference
        before = next((key for key in self._keys(record) if self._hash(key) == against), None)
        older = None if before is None else self._storage[before]
        payload = encode_payload(received.tensors, codec=Codec(()))
        self._storage[f"{record}/{LAST}"] = payload
        key = f"{record}/{BEFORE}"
        if older is not None and against != received.reference:
            self._storage[key] = older
        elif key in self._storage:
            del self._storage[key]

    def forget(self, record: str) -> None:
        """Drop everything that is held of a record."""
        for key in (*self._keys(record), f"{record}/{DESCRIPTION}"):
            self._storage.pop(key, None)

    def _keys(self, record: str) -> list[str]:
        return [key for part in (LAST, BEFORE) if (key := f"{record}/{part}") in self._storage]

    def _hash(self, key: str) -> str | None:
        state = self._state(key)
        return None if state is None else reference_hash(state)

    def _state(self, key: str) -> Tensors | None:
        data = self._storage[key]
        try:
            return open_payload(data, limit=max(len(data), 1)).decode(borrowed=True).tensors
        except PayloadError:
            return None  # a damaged state counts as not held; the server will be told


class _StoredState(Mapping[str, Tensors]):
    """One state by its hash, loaded at each look-up."""

    def __init__(self, reference: str, load: Callable[[], Tensors | None]) -> None:
        self._reference = reference
        self._load = load

    def __getitem__(self, reference: str) -> Tensors:
        found = self._load() if reference == self._reference else None
        if found is None:
            raise KeyError(reference)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter([self._reference])

    def __len__(self) -> int:
        return 1


def _described(header: PayloadHeader, own: Sequence[ModelSpec]) -> ModelSpec | None:
    """Return the one of some models that a message describes; None if it describes another."""
    for spec in own:
        try:
            spec.check_described(header.model or {}, here="this side", there="the sender")
        except PayloadError:
            continue
        return spec
    return None
