"""The client's side: what it holds, and what it says when it does not hold enough."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

from fedpara_plugins.codecs import (
    PayloadHeader,
    decode_payload,
    encode_payload,
    peek_header,
    reference_hash,
)
from fedpara_plugins.codecs.agreement import check_model
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references.version_zero import base_from_header
from fedpara_plugins.stages.stage import Tensors

__all__ = ["ClientReferences", "LostReferenceError", "Received"]

LAST = "last"
BEFORE = "before"


class LostReferenceError(MismatchError):
    """The message is sound, but coded against what this client does not hold.

    Attributes:
        holds: what it does hold, by hash, for the server's ``refused``.
    """

    def __init__(self, message: str, holds: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.holds = holds


@dataclass(frozen=True)
class Received:
    """A decoded downlink.

    Attributes:
        tensors: the shared state.
        reference: its hash, for the answer to name.
        header: of the payload.
    """

    tensors: Tensors
    reference: str
    header: PayloadHeader


class ClientReferences:
    """What a client holds of each record: the state it received last, and what that came against.

    Both are needed: a server that never got the answer codes its next message against the older
    one. Nothing changes before `keep`, so a round that fails leaves no trace.

    Args:
        storage: where the states live, as bytes by key; whatever survives in the framework at
            hand. A dict that lives as long as this object by default.
    """

    def __init__(self, storage: MutableMapping[str, bytes] | None = None) -> None:
        self._storage: MutableMapping[str, bytes] = {} if storage is None else storage

    def holds(self, record: str) -> tuple[str, ...]:
        """The hashes of what is held of that record, the last one first."""
        return tuple(self._held(record))

    def receive(
        self, record: str, payload: bytes, *, limit: int, expect: ModelSpec | None = None
    ) -> Received:
        """Decode a downlink.

        Args:
            record: its name.
            payload: the bytes.
            limit: bytes that the state may have.
            expect: this side's model, if it is known; a message that describes another is refused
                before anything is derived or decoded.

        Raises:
            MismatchError: the message is of another model than expected.
            LostReferenceError: answer with its ``holds`` and no work done; the server sends again.
            PayloadError: the payload is damaged or exceeds the limit.
        """
        header = peek_header(payload)
        if expect is not None:
            check_model(header, expect)
        wanted = header.reference
        references: dict[str, Tensors] = {}
        if wanted is not None:
            base = base_from_header(header.extra, header.model, limit=limit, expect=expect)
            references = self._held(record) if base is None else {base.reference: base.tensors}
            if wanted not in references:
                what = "version 0" if base else "a reference"
                raise LostReferenceError(
                    f"record {record!r} is coded against {what} {wanted[:16]}, this client holds "
                    f"{', '.join(name[:16] for name in references) or 'none'}; the server is to "
                    "send it again, coded against what the client holds",
                    self.holds(record),
                )
        tensors = decode_payload(payload, references=references, limit=limit).tensors
        return Received(tensors, reference_hash(tensors), header)

    def keep(self, record: str, received: Received) -> None:
        """Hold what was received, and what it was coded against if that was held."""
        against = received.header.reference
        before = next((key for key in self._keys(record) if self._hash(key) == against), None)
        kept = None if before is None else self._storage[before]
        payload = encode_payload(received.tensors, codec=Codec(()))
        self._storage[f"{record}/{LAST}"] = payload
        key = f"{record}/{BEFORE}"
        if kept is not None and against != received.reference:
            self._storage[key] = kept
        elif key in self._storage:
            del self._storage[key]

    def forget(self, record: str) -> None:
        """Hold nothing of that record any more."""
        for key in self._keys(record):
            del self._storage[key]

    def _keys(self, record: str) -> list[str]:
        return [key for part in (LAST, BEFORE) if (key := f"{record}/{part}") in self._storage]

    def _held(self, record: str) -> dict[str, Tensors]:
        states = (self._state(key) for key in self._keys(record))
        return {reference_hash(state): state for state in states if state is not None}

    def _hash(self, key: str) -> str | None:
        state = self._state(key)
        return None if state is None else reference_hash(state)

    def _state(self, key: str) -> Tensors | None:
        data = self._storage[key]
        try:
            return decode_payload(data, limit=max(len(data), 1)).tensors
        except PayloadError:
            return None  # what is damaged is not held; the server will be told
