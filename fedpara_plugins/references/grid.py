"""Scheme 2: states published on a grid; the server keeps the last few, and none per client."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
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
from fedpara_plugins.references.first_contact import DerivedReferences
from fedpara_plugins.references.grid_steps import PublishedState, publish
from fedpara_plugins.references.index import NOTHING, ClientIndex
from fedpara_plugins.references.request import EncodedCache, EncodeRequest, log_whole_model
from fedpara_plugins.references.store import MEMORY_BYTES, ReferenceStore
from fedpara_plugins.references.version_log import Version, VersionLog
from fedpara_plugins.references.version_zero import SEEDED, ZEROS, DerivedKind
from fedpara_plugins.stages.grid import GridStage
from fedpara_plugins.stages.stage import Tensors
from fedpara_plugins.support.outages import Outages

__all__ = ["GridDownlink"]

log = logging.getLogger("fedpara.references")

OWN_MESSAGE = 2**62
"""Limit in bytes for decoding a message that this server has encoded itself."""

DEFAULT_COARSENESS = 1 / 20
REMEMBERED = 64
"""Messages kept of a record's newest version; clients can hold no more states than versions."""


class GridDownlink:
    """Scheme 2: for many clients; the server keeps a few states, however many clients were away.

    Every new content becomes a version: the point of the grid that is nearest to it. A message is
    the exact difference between two versions, so all clients hold the same states, and one payload
    serves all clients that hold the same state. A client whose version is no longer kept gets the
    difference from version 0, or from zeros if it cannot derive version 0.

    The scheme is made for content that is the same for all clients. With a lossless codec, or one
    that needs no reference, contents are sent as they are.

    Args:
        folder: for versions and the table of clients, so that a server that was killed can resume;
            None for memory and a temporary folder.
        memory_bytes: size of the versions kept in memory.
        versions: how many are kept of each record.
        coarseness: the size of the grid's steps relative to the root mean square of a round's
            update; the nearest power of two is taken. None takes what the codec's
            ``quantise:rms=...`` says (2 for the preset ``small``), or 1/20 if it says nothing.
        remember: whether to keep one hash per client, that of its version. If not, nothing at all
            is kept per client, and the caller passes ``holds``, what the client named.
        outages: gets what cannot be written; None logs it alone.

    Attributes:
        counts: messages encoded so far, by kind (see `EncodedDownlink`).
    """

    def __init__(
        self,
        *,
        folder: Path | None = None,
        memory_bytes: int = MEMORY_BYTES,
        versions: int = 32,
        coarseness: float | None = None,
        remember: bool = True,
        outages: Outages | None = None,
    ) -> None:
        states = None if folder is None else folder / "versions"
        path = None if folder is None else folder / "grid.sqlite"
        clients = None if folder is None else folder / "grid-clients.sqlite"
        self._store = ReferenceStore(memory_bytes=memory_bytes, folder=states, outages=outages)
        self._log = VersionLog(path, keep=versions, outages=outages)
        self._index = ClientIndex(clients, outages)
        self._remember = remember
        self._coarseness = coarseness
        self._derived = DerivedReferences()
        self._encoded = EncodedCache(REMEMBERED)
        self._lock = threading.RLock()
        self.counts: Counter[MessageKind] = Counter()
        self._store.retain(self._log.references())

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
        holds: str | None = None,
    ) -> EncodedDownlink:
        """Encode a state for one client; new content becomes a version.

        Args:
            client: any stable name of the client.
            record: the record's name.
            tensors: the state; private names may be in it and are left out.
            spec: the model.
            codec: the run's codec for downlinks, of which the entropy coder is used.
            decoders: the entropy decoders that the client has, if it named them.
            extra: the caller's own JSON for the header.
            content: `reference_hash` of the shared ``tensors``, if the caller knows it.
            form: of the header, for a client that reads version 2; version 1 by default.
            holds: the hash that the client named, "" for nothing at all; by default what it named
                last, if that is remembered.

        Raises:
            PayloadError: a tensor cannot be coded.
        """
        with self._lock:
            shared = shared_tensors(spec, tensors)
            codec = codec.resolved(decoders)
            content = content or reference_hash(shared)
            request = EncodeRequest(record, shared, content, spec, codec, dict(extra or {}), form)
            version = self._version(request)
            held = self._index.held(client, record) if holds is None else holds
            message = self._message(request, version, held)
            self.counts[message.kind] += 1
            return message

    def _version(self, request: EncodeRequest) -> Version:
        """Return the newest version, which stands for this content; publish it if it is new."""
        last = self._log.last(request.record)
        state = None if last is None else self._store.get(last.reference)
        if last is not None and last.content == request.content and state is not None:
            return last
        if _without_grid(request.codec):
            payload = encode_payload(request.tensors, codec=request.codec)
            new = PublishedState(decode_payload(payload, limit=OWN_MESSAGE).tensors, {})
        else:
            if last is not None and state is not None and same_layout(request.tensors, state):
                before = PublishedState(state, last.exponents)
            else:
                derived = self._derived.nearest(request.spec, request.tensors)
                before = PublishedState(derived.tensors, {})
            coarseness = self._coarseness or _coarseness(request.codec)
            new = publish(request.tensors, before, coarseness=coarseness)
        reference = self._store.add(new.state)
        number = last.number + 1 if last else 1
        version = Version(number, reference, request.content, new.exponents)
        self._log.add(request.record, version)
        self._store.retain(self._log.references())
        return version

    def _message(
        self, request: EncodeRequest, version: Version, held: str | None
    ) -> EncodedDownlink:
        """Return the message, encoded once for all clients that hold the same state."""
        state = self._store.get(held) if held else None
        if state is None or not same_layout(request.tensors, state):
            held, state = (NOTHING if held == NOTHING else None), None
        kind = _kind(request, version, held)
        return self._encoded.get(
            request.record,
            version.reference,
            request.key(kind, held),
            lambda: self._encode(request, version, kind, held, state),
        )

    def _encode(
        self,
        request: EncodeRequest,
        version: Version,
        kind: MessageKind,
        held: str | None,
        state: Tensors | None,
    ) -> EncodedDownlink:
        if kind not in ("full", "first"):
            payload = self._payload(request, version, state, held, request.extra)
            return EncodedDownlink(payload, version.reference, kind)
        # The versions stand on the grid of the derived reference that the first one started from.
        references: tuple[DerivedKind, ...] = (ZEROS,) if kind == "full" else (SEEDED, ZEROS)
        payloads = [self._from_derived(request, version, derived) for derived in references]
        message = EncodedDownlink(min(payloads, key=len), version.reference, kind)
        log_whole_model(message)
        return message

    def _from_derived(self, request: EncodeRequest, version: Version, kind: DerivedKind) -> bytes:
        derived = self._derived.get(kind, request.spec, request.tensors)
        extra = {**request.extra, **derived.extra}
        return self._payload(request, version, derived.tensors, derived.reference, extra)

    def _payload(
        self,
        request: EncodeRequest,
        version: Version,
        reference: Tensors | None,
        digest: str | None,
        extra: Mapping[str, Any],
    ) -> bytes:
        codec, tensors = request.codec, request.tensors
        if not _without_grid(codec):
            entropy = tuple(stage for stage in codec.stages if stage.entropy)
            codec, tensors = Codec((GridStage(), *entropy)), self._store[version.reference]
        return encode_payload(
            tensors,
            codec=codec,
            reference=reference if codec.needs_reference else None,
            digest=digest,
            model=request.spec.to_json(),
            extra=dict(extra) or None,
            form=request.form,
        )

    # Receiving

    def acknowledge(self, client: str, record: str, held: str | None) -> None:
        """Note that a client has answered and holds this state, by hash; None for no state.

        A hash is ignored unless it is that of a version that is kept.
        """
        with self._lock:
            if held is None:
                self._index.forget(client, record)
            elif self._remember and held in self._store:
                self._index.replace(client, record, held)

    def refused(self, client: str, record: str, holds: Sequence[str] = ()) -> None:
        """Note that a client could not decode its last message; the next one will suit it.

        Args:
            client: its name.
            record: the record's name.
            holds: the states that it holds, by hash. If none of them is kept here, the next message
                is self-contained.
        """
        with self._lock:
            known = next((reference for reference in holds if reference in self._store), NOTHING)
            if self._remember:
                self._index.replace(client, record, known)
            log.info("fedpara: client %s lost what it held and is served again", client)

    @property
    def references(self) -> Mapping[str, Tensors]:
        """Return every state that a client may take a delta against, by hash."""
        return self._store

    def close(self) -> None:
        """Close the files; another server may resume from the folder."""
        with self._lock:
            self._index.close()
            self._log.close()
            self._store.close()


def _without_grid(codec: Codec) -> bool:
    """Return whether contents are sent as they are."""
    return codec.lossless or not codec.needs_reference


def _coarseness(codec: Codec) -> float:
    stated = (stage.options.get("rms") for stage in codec.stages)
    return next((float(value) for value in stated if value), DEFAULT_COARSENESS)


def _kind(request: EncodeRequest, version: Version, held: str | None) -> MessageKind:
    if _without_grid(request.codec):
        return "plain"
    if held:
        return "repeat" if held == version.reference else "update"
    return "first" if held is None else "full"
