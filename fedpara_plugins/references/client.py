"""The client's side of references: the states that it holds, and the error if one is missing."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

from fedpara_plugins.codecs import (
    Description,
    LostDescriptionError,
    PayloadHeader,
    decode_payload,
    encode_payload,
    reference_hash,
)
from fedpara_plugins.codecs.agreement import check_model
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.codecs.payload import open_payload
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references.version_zero import reference_from_header
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
        most_tensors: int | None = None,
    ) -> DecodedDownlink:
        """Decode a downlink message.

        Args:
            record: the record's name.
            payload: the bytes.
            limit: largest size of the state in bytes.
            expect: this side's model, if it is known; a message that describes another model is
                refused before anything is derived or decoded.
            most_tensors: number of tensors that there may be, as for `decode_payload`.

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
        references: dict[str, Tensors] = {}
        if header.reference is not None:
            references = self._wanted(record, header, header.reference, limit, expect)
        tensors = opened.decode(references=references).tensors
        return DecodedDownlink(tensors, reference_hash(tensors), header)

    def _wanted(
        self, record: str, header: PayloadHeader, wanted: str, limit: int, expect: ModelSpec | None
    ) -> dict[str, Tensors]:
        """Return the state that a message is coded against, by its hash."""
        derived = reference_from_header(header.extra, header.model, limit=limit, expect=expect)
        if derived is not None:
            what, known = "version 0", [derived.reference]
            if derived.reference == wanted:
                return {wanted: derived.tensors}
        else:
            what, known = "a reference", []
            for key in self._keys(record):  # one state in memory at a time
                state = self._state(key)
                if state is None:
                    continue
                known.append(reference_hash(state))
                if known[-1] == wanted:
                    return {wanted: state}
                del state
        raise LostReferenceError(
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
            return decode_payload(data, limit=max(len(data), 1)).tensors
        except PayloadError:
            return None  # a damaged state counts as not held; the server will be told
