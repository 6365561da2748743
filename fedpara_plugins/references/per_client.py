"""Each downlink is coded against what that very client holds; the server keeps a copy of that."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpara_plugins.codecs import decode_payload, encode_payload, reference_hash
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references.coded import Coded, Kind, alike, shared_part
from fedpara_plugins.references.first_contact import Bases, fine_codec
from fedpara_plugins.references.index import NOTHING, HeldIndex
from fedpara_plugins.references.store import MEMORY, ReferenceStore
from fedpara_plugins.references.version_zero import ZEROS
from fedpara_plugins.stages.stage import Tensors

__all__ = ["PerClientDownlink"]

log = logging.getLogger("fedpara.references")

OWN_MESSAGE = 2**62
"""The limit for decoding a message of one's own."""

REMEMBERED = 8
"""Payloads of a record that are kept for clients that hold the same."""


class PerClientDownlink:
    """Scheme 1: the best compression; one state a client on the server's disk.

    Clients that hold the same (by hash) share one copy and one encoding. A message is coded
    against what the client last said it holds; while its answer is awaited the server keeps both
    that and the new state, since it cannot know which of them the client has.

    Args:
        folder: for the states and the table of who holds what, so that a server that is killed
            goes on where it was; None keeps the table in memory and spills states to a temporary
            folder.
        memory_bytes: of states kept in memory. Besides, the server holds two states that version 0
            takes, one message that is being coded, and some hundred bytes a client.

    Attributes:
        counts: messages encoded so far, by kind (see `Coded`).
    """

    def __init__(self, *, folder: Path | None = None, memory_bytes: int = MEMORY) -> None:
        states = None if folder is None else folder / "states"
        self._store = ReferenceStore(memory_bytes=memory_bytes, folder=states)
        self._index = HeldIndex(None if folder is None else folder / "clients.sqlite")
        self._bases = Bases()
        self._encoded: dict[str, tuple[str, OrderedDict[str, Coded]]] = {}
        self._plain: set[str] = set()
        self._lock = threading.RLock()
        self.counts: Counter[Kind] = Counter()
        self._go_on()

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
    ) -> Coded:
        """The payload for one client, whose answer is from now on awaited.

        Args:
            client: any stable name of it.
            record: name of the model, where a message carries several.
            tensors: private names allowed (they are left out).
            spec: the model.
            codec: the run's codec for downlinks; its feedback is not needed here, since each
                message is taken against what the client really has.
            decoders: the entropy decoders that the client has, if it said so.
            extra: the caller's own JSON for the header.
            content: `reference_hash` of the shared part of ``tensors``, where the caller knows it.

        Raises:
            PayloadError: a tensor cannot be coded.
        """
        with self._lock:
            shared = shared_part(spec, tensors)
            codec = codec.resolved(decoders)
            content = content or reference_hash(shared)
            job = _Job(shared, content, spec, codec, dict(extra or {}))
            base = _Held(NOTHING, None)
            if codec.needs_reference:
                base = self._base(self._index.held(client, record), shared)
                self._plain.discard(record)
            else:
                self._plain.add(record)
            coded = self._coded(record, job, base)
            self._drop(self._index.sent(client, record, coded.reference, job.content))
            self.counts[coded.kind] += 1
            return coded

    def _base(self, held: str | None, shared: Tensors) -> _Held:
        """What the client holds, if a message can be coded against it."""
        state = self._store.get(held) if held else None
        if held and state is not None and alike(shared, state):
            return _Held(held, state)
        return _Held(NOTHING if held == NOTHING else None, None)

    def _coded(self, record: str, job: _Job, base: _Held) -> Coded:
        """The payload, made once for all clients that hold the same."""
        content, known = self._encoded.get(record, ("", OrderedDict()))
        if content != job.content:
            known = OrderedDict()
            self._encoded[record] = (job.content, known)
        kind = self._kind(job, base)
        key = json.dumps([kind, base.reference, job.codec.name, job.spec.fingerprint, job.extra])
        if key not in known or known[key].reference not in self._store:
            known[key] = self._encode(job, kind, base)
        known.move_to_end(key)
        while len(known) > REMEMBERED:
            known.popitem(last=False)
        return known[key]

    def _kind(self, job: _Job, base: _Held) -> Kind:
        if not job.codec.needs_reference:
            return "plain"
        if base.reference and base.state is not None:
            # To evaluate a model, say, and now to train on it: "no change" costs next to nothing,
            # where coding the rounding that is left would cost a message.
            same = self._index.content(base.reference) == job.content
            return "repeat" if same else "update"
        return "first" if base.reference is None else "full"

    def _encode(self, job: _Job, kind: Kind, base: _Held) -> Coded:
        codec, extra = job.codec, job.extra
        reference, digest = base.state, base.reference
        if kind in ("first", "full"):
            derived = (
                self._bases.nearest(job.spec, job.shared)
                if kind == "first"
                else self._bases.get(ZEROS, job.spec, job.shared)
            )
            codec, extra = fine_codec(codec), {**extra, **derived.extra}
            reference, digest = derived.tensors, derived.reference
        payload = encode_payload(
            job.shared if kind != "repeat" or reference is None else reference,
            codec=codec,
            reference=reference,
            digest=digest,
            model=job.spec.to_json(),
            extra=extra or None,
        )
        # Decoded again here, since a lossy codec leaves the client with other values.
        held = {digest: reference} if digest and reference is not None else None
        received = decode_payload(payload, references=held, limit=OWN_MESSAGE).tensors
        if kind in ("first", "full"):
            log.info(
                "fedpara: what a client needs that %s takes %d bytes",
                "holds nothing yet" if kind == "first" else "lost everything",
                len(payload),
            )
        return Coded(payload, self._store.add(received), kind)

    # Receiving

    def acknowledge(self, client: str, record: str, held: str | None) -> None:
        """A client has answered, and said by hash what it holds now; None for nothing.

        A hash that was not sent to this client, or was overtaken by a later answer, is ignored.
        """
        with self._lock:
            if held is None:
                self._drop(self._index.forget(client, record))
            elif self._index.knows(client, record, held):
                # Without a delta in the codec nobody needs it once the answer is decoded.
                keep = record not in self._plain
                self._drop(self._index.hold(client, record, held, keep=keep))

    def refused(self, client: str, record: str, holds: Sequence[str] = ()) -> None:
        """A client could not decode its last message: the next one will suit it.

        Args:
            client: its name.
            record: the record's name.
            holds: what it does have, by hash; the next message is self-contained if none of it is
                known here.
        """
        with self._lock:
            known = next((reference for reference in holds if reference in self._store), NOTHING)
            self._drop(self._index.only(client, record, known))
            log.info("fedpara: client %s lost what it held and is served again", client)

    @property
    def references(self) -> Mapping[str, Tensors]:
        """Everything that some client may take a delta against, by hash."""
        return self._store

    def close(self) -> None:
        """Close the files; another server may go on from the folder."""
        with self._lock:
            self._index.close()
            self._store.close()

    def _drop(self, references: Collection[str]) -> None:
        for reference in references:
            self._store.discard(reference)

    def _go_on(self) -> None:
        """Bring table and states together after a death between the two."""
        used = self._index.used()
        self._store.retain(used)
        missing = [reference for reference in used if reference not in self._store]
        if clients := self._index.clients():
            log.info("fedpara: the server goes on with what %d clients hold", clients)
        if missing:
            log.warning(
                "fedpara: the states behind %d references are gone: each client that holds one "
                "gets one full coded downlink",
                len(missing),
            )


@dataclass(frozen=True)
class _Job:
    """What is to be sent."""

    shared: Tensors
    content: str
    spec: ModelSpec
    codec: Codec
    extra: dict[str, Any]


@dataclass(frozen=True)
class _Held:
    """What a client holds: a known state; `NOTHING`; or, with None, at least version 0."""

    reference: str | None
    state: Tensors | None
