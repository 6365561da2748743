"""Scheme 1: downlinks coded against what each client holds; the server keeps copies of that."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpara_plugins.codecs import decode_payload, encode_payload, reference_hash
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.codecs.description import HeaderForm
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references.downlink import (
    EncodedDownlink,
    MessageKind,
    same_layout,
    shared_tensors,
)
from fedpara_plugins.references.first_contact import DerivedReferences, fine_codec
from fedpara_plugins.references.index import NOTHING, ClientIndex
from fedpara_plugins.references.request import EncodedCache, EncodeRequest, log_whole_model
from fedpara_plugins.references.store import MEMORY_BYTES, ReferenceStore
from fedpara_plugins.references.version_zero import ZEROS
from fedpara_plugins.stages.stage import Tensors
from fedpara_plugins.support.outages import Outages

__all__ = ["PerClientDownlink"]

log = logging.getLogger("fedpara.references")

OWN_MESSAGE = 2**62
"""Limit in bytes for decoding a message that this server has encoded itself."""

REMEMBERED = 8
"""Messages of a record that are kept for further clients that hold the same state."""


class PerClientDownlink:
    """Scheme 1: the best compression, for one state per client on the server's disk.

    Clients that hold the same state (by hash) share one copy and one encoding. A message is coded
    against what the client last said it holds. While its answer is awaited, the server keeps both
    that state and the new one, since it cannot know which of them the client has.

    Args:
        folder: for the states and the table of who holds what, so that a server that was killed can
            resume; None keeps the table in memory and moves states that exceed the memory to a
            temporary folder.
        memory_bytes: size of the states kept in memory. In addition the server holds the two states
            that version 0 takes, one message that is being encoded, and some hundred bytes per
            client.
        outages: gets what cannot be written; None logs it alone.

    Attributes:
        counts: messages encoded so far, by kind (see `EncodedDownlink`).
    """

    def __init__(
        self,
        *,
        folder: Path | None = None,
        memory_bytes: int = MEMORY_BYTES,
        outages: Outages | None = None,
    ) -> None:
        states = None if folder is None else folder / "states"
        self._store = ReferenceStore(memory_bytes=memory_bytes, folder=states, outages=outages)
        self._index = ClientIndex(None if folder is None else folder / "clients.sqlite", outages)
        self._derived = DerivedReferences()
        self._encoded = EncodedCache(REMEMBERED)
        self._plain: set[str] = set()
        self._lock = threading.RLock()
        self.counts: Counter[MessageKind] = Counter()
        self._resume()

    # Sending

    def encode(
        self,
        client: str,
        record: str,
        tensors: Mapping[str, Tensor],
        *,
        spec: ModelSpec,
        codec: Codec,
        decoders: Collection[str] | None = None,
        extra: Mapping[str, Any] | None = None,
        content: str | None = None,
        form: HeaderForm | None = None,
    ) -> EncodedDownlink:
        """Encode a state for one client, whose answer is awaited from now on.

        Args:
            client: any stable name of the client.
            record: the record's name, where a message carries several.
            tensors: the state; private names may be in it and are left out.
            spec: the model.
            codec: the run's codec for downlinks. Its feedback is not needed here, since each
                message is coded against what the client really has.
            decoders: the entropy decoders that the client has, if it named them.
            extra: the caller's own JSON for the header.
            content: `reference_hash` of the shared ``tensors``, if the caller knows it.
            form: of the header, for a client that reads version 2; version 1 by default.

        Raises:
            PayloadError: a tensor cannot be coded.
        """
        with self._lock:
            shared = shared_tensors(spec, tensors)
            codec = codec.resolved(decoders)
            content = content or reference_hash(shared)
            request = EncodeRequest(record, shared, content, spec, codec, dict(extra or {}), form)
            held = _HeldState(NOTHING, None)
            if codec.needs_reference:
                held = self._held_state(self._index.held(client, record), shared)
                self._plain.discard(record)
            else:
                self._plain.add(record)
            kind = self._kind(request, held)
            message = self._encoded.get(
                record,
                content,
                request.key(kind, held.reference),
                lambda: self._encode(request, kind, held),
                usable=lambda known: known.reference in self._store,
            )
            self._drop(self._index.note_sent(client, record, message.reference, content))
            self.counts[message.kind] += 1
            return message

    def _held_state(self, held: str | None, shared: Tensors) -> _HeldState:
        """Return what the client holds, if a message can be coded against it.

        Messages from version 0 on leave all clients in one state: where no more states can be kept,
        that is the one.
        """
        state = self._store.get(held) if held and not self._store.is_short else None
        if held and state is not None and same_layout(shared, state):
            return _HeldState(held, state)
        return _HeldState(NOTHING if held == NOTHING else None, None)

    def _kind(self, request: EncodeRequest, held: _HeldState) -> MessageKind:
        if not request.codec.needs_reference:
            return "plain"
        if held.reference and held.state is not None:
            # The client may have got the same content before, to evaluate a model, say, and now to
            # train it: "no change" costs next to nothing; coding the remaining rounding error would
            # cost a message.
            same = self._index.content_of(held.reference) == request.content
            return "repeat" if same else "update"
        return "first" if held.reference is None else "full"

    def _encode(
        self, request: EncodeRequest, kind: MessageKind, held: _HeldState
    ) -> EncodedDownlink:
        codec, extra = request.codec, request.extra
        reference, digest = held.state, held.reference
        if kind in ("first", "full"):
            derived = (
                self._derived.nearest(request.spec, request.tensors)
                if kind == "first"
                else self._derived.get(ZEROS, request.spec, request.tensors)
            )
            codec, extra = fine_codec(codec), {**extra, **derived.extra}
            reference, digest = derived.tensors, derived.reference
        payload = encode_payload(
            request.tensors if kind != "repeat" or reference is None else reference,
            codec=codec,
            reference=reference,
            digest=digest,
            model=request.spec.to_json(),
            extra=extra or None,
            form=request.form,
        )
        # Decoded here as well, since after a lossy codec the client has other values.
        references = {digest: reference} if digest and reference is not None else None
        received = decode_payload(
            payload,
            references=references,
            limit=OWN_MESSAGE,
            descriptions=request.descriptions,
        ).tensors
        message = EncodedDownlink(payload, self._store.add(received), kind)
        if kind in ("first", "full"):
            log_whole_model(message)
        return message

    # Receiving

    def acknowledge(self, client: str, record: str, held: str | None) -> None:
        """Note that a client has answered and holds this state, by hash; None for no state.

        A hash is ignored if it was not sent to this client, or if a later answer came before.
        """
        with self._lock:
            if held is None:
                self._drop(self._index.forget(client, record))
            elif self._index.knows(client, record, held):
                # Without a delta in the codec, the state is not needed once the answer is decoded.
                keep = record not in self._plain
                self._drop(self._index.note_held(client, record, held, keep=keep))

    def refused(self, client: str, record: str, holds: Sequence[str] = ()) -> None:
        """Note that a client could not decode its last message; the next one will suit it.

        Args:
            client: its name.
            record: the record's name.
            holds: the states that it holds, by hash. If none of them is known here, the next
                message is self-contained.
        """
        with self._lock:
            known = next((reference for reference in holds if reference in self._store), NOTHING)
            self._drop(self._index.replace(client, record, known))
            log.info("fedpara: client %s lost what it held and is served again", client)

    @property
    def references(self) -> Mapping[str, Tensors]:
        """Return every state that a client may take a delta against, by hash."""
        return self._store

    def close(self) -> None:
        """Close the files; another server may resume from the folder."""
        with self._lock:
            self._index.close()
            self._store.close()

    def _drop(self, references: Collection[str]) -> None:
        for reference in references:
            self._store.discard(reference)

    def _resume(self) -> None:
        """Make the table and the states agree, if a server died between writing the two."""
        used = self._index.references()
        self._store.retain(used)
        missing = [reference for reference in used if reference not in self._store]
        if clients := self._index.count_clients():
            log.info("fedpara: the server resumes with the states that %d clients hold", clients)
        if missing:
            log.warning(
                "fedpara: the states behind %d references are gone: each client that holds one "
                "gets one full coded downlink",
                len(missing),
            )


@dataclass(frozen=True)
class _HeldState:
    """What a client holds: a known state; `NOTHING`; or, with None, at least version 0."""

    reference: str | None
    state: Tensors | None
