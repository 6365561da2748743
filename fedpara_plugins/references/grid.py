"""Published states on a grid: the server keeps the last few, and no state for any client."""

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
from fedpara_plugins.references.first_contact import Bases
from fedpara_plugins.references.grid_steps import Published, publish
from fedpara_plugins.references.index import NOTHING, HeldIndex
from fedpara_plugins.references.store import MEMORY, ReferenceStore
from fedpara_plugins.references.version_log import Version, VersionLog
from fedpara_plugins.references.version_zero import SEEDED, ZEROS, BaseKind
from fedpara_plugins.stages.grid import GridStage
from fedpara_plugins.stages.stage import Tensors

__all__ = ["GridDownlink"]

log = logging.getLogger("fedpara.references")

OWN_MESSAGE = 2**62
FINE = 1 / 20
REMEMBERED = 64
"""Payloads of a record's newest version that are kept; there are no more bases than versions."""


class GridDownlink:
    """Scheme 2: what a million clients ask for; a few states in all, whoever was away.

    Every new content becomes a version: the point of the grid that is nearest to it. A message is
    the exact difference between two versions, so all clients hold the same states, and the payload
    for one client serves all that hold the same. A client whose version is no longer kept gets the
    difference from version 0, or from zeros where it cannot derive that.

    Made for content that is the same for all clients. With a lossless codec, or one that needs no
    reference, contents are sent as they are.

    Args:
        folder: for versions and table, so that a server that is killed goes on; None for memory
            and a temporary folder.
        memory_bytes: of versions kept in memory.
        versions: kept of each record.
        coarseness: of the grid's steps, relative to the root mean square of a round's update;
            nearest power of two. None takes what the codec's ``quantise:rms=...`` says (2 for the
            preset ``small``), or 1/20 where it says nothing.
        remember: keep one hash a client, that of its version. Without it nothing at all is kept
            and the caller passes ``holds``, what the client named.

    Attributes:
        counts: messages encoded so far, by kind (see `Coded`).
    """

    def __init__(
        self,
        *,
        folder: Path | None = None,
        memory_bytes: int = MEMORY,
        versions: int = 32,
        coarseness: float | None = None,
        remember: bool = True,
    ) -> None:
        states = None if folder is None else folder / "versions"
        self._store = ReferenceStore(memory_bytes=memory_bytes, folder=states)
        self._log = VersionLog(None if folder is None else folder / "grid.sqlite", keep=versions)
        self._index = HeldIndex(None if folder is None else folder / "grid-clients.sqlite")
        self._remember = remember
        self._coarseness = coarseness
        self._bases = Bases()
        self._encoded: dict[str, tuple[str, OrderedDict[str, Coded]]] = {}
        self._lock = threading.RLock()
        self.counts: Counter[Kind] = Counter()
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
        holds: str | None = None,
    ) -> Coded:
        """The payload for one client; a content that is new becomes a version.

        Args:
            client: any stable name of it.
            record: name of the model.
            tensors: private names allowed (they are left out).
            spec: the model.
            codec: the run's codec for downlinks, of which the entropy coder is used.
            decoders: the entropy decoders that the client has, if it said so.
            extra: the caller's own JSON for the header.
            content: `reference_hash` of the shared part of ``tensors``, where the caller knows it.
            holds: the hash that the client named, "" for nothing at all; by default what it named
                last, if that is remembered.

        Raises:
            PayloadError: a tensor cannot be coded.
        """
        with self._lock:
            shared = shared_part(spec, tensors)
            codec = codec.resolved(decoders)
            content = content or reference_hash(shared)
            job = _Job(record, shared, content, spec, codec, dict(extra or {}))
            version = self._version(job)
            held = self._index.held(client, record) if holds is None else holds
            coded = self._coded(job, version, held)
            self.counts[coded.kind] += 1
            return coded

    def _version(self, job: _Job) -> Version:
        """The newest version, which stands for this content."""
        last = self._log.last(job.record)
        state = None if last is None else self._store.get(last.reference)
        if last is not None and last.content == job.content and state is not None:
            return last
        if job.plain:
            payload = encode_payload(job.shared, codec=job.codec)
            new = Published(decode_payload(payload, limit=OWN_MESSAGE).tensors, {})
        else:
            before = None
            if last is not None and state is not None and alike(job.shared, state):
                before = Published(state, last.exponents)
            if before is None:
                base = self._bases.nearest(job.spec, job.shared)
                before = Published(base.tensors, {})
            coarseness = self._coarseness or _coarseness(job.codec)
            new = publish(job.shared, before, coarseness=coarseness)
        reference = self._store.add(new.state)
        number = last.number + 1 if last else 1
        version = Version(number, reference, job.content, new.exponents)
        self._log.add(job.record, version)
        self._store.retain(self._log.references())
        self._encoded.pop(job.record, None)
        return version

    def _coded(self, job: _Job, version: Version, held: str | None) -> Coded:
        """The payload, made once for all clients that hold the same."""
        reference, known = self._encoded.get(job.record, ("", OrderedDict()))
        if reference != version.reference:
            known = OrderedDict()
            self._encoded[job.record] = (version.reference, known)
        base = self._store.get(held) if held else None
        if base is None or not alike(job.shared, base):
            held, base = (NOTHING if held == NOTHING else None), None
        kind = _kind(job, version, held)
        key = json.dumps([kind, held, job.codec.name, job.spec.fingerprint, job.extra])
        if key not in known:
            known[key] = self._encode(job, version, kind, held, base)
        known.move_to_end(key)
        while len(known) > REMEMBERED:
            known.popitem(last=False)
        return known[key]

    def _encode(
        self, job: _Job, version: Version, kind: Kind, held: str | None, base: Tensors | None
    ) -> Coded:
        if kind == "full":
            payload = self._from_base(job, version, ZEROS)
            log.info(
                "fedpara: what a client needs that lost everything takes %d bytes", len(payload)
            )
        elif kind == "first":
            # The versions stand on the grid of the base that the first one was taken from.
            both = [self._from_base(job, version, kind) for kind in (SEEDED, ZEROS)]
            payload = min(both, key=len)
            log.info(
                "fedpara: what a client needs that holds nothing yet takes %d bytes", len(payload)
            )
        else:
            payload = self._payload(job, version, base, held, job.extra)
        return Coded(payload, version.reference, kind)

    def _from_base(self, job: _Job, version: Version, kind: BaseKind) -> bytes:
        base = self._bases.get(kind, job.spec, job.shared)
        return self._payload(
            job, version, base.tensors, base.reference, {**job.extra, **base.extra}
        )

    def _payload(
        self,
        job: _Job,
        version: Version,
        base: Tensors | None,
        digest: str | None,
        extra: Mapping[str, Any],
    ) -> bytes:
        codec = job.codec
        if not job.plain:
            entropy = tuple(stage for stage in codec.stages if stage.entropy)
            codec = Codec((GridStage(), *entropy))
        return encode_payload(
            job.shared if job.plain else self._store[version.reference],
            codec=codec,
            reference=base if codec.needs_reference else None,
            digest=digest,
            model=job.spec.to_json(),
            extra=dict(extra) or None,
        )

    # Receiving

    def acknowledge(self, client: str, record: str, held: str | None) -> None:
        """A client has answered, and said by hash what it holds now; None for nothing.

        A hash of no version that is kept is ignored.
        """
        with self._lock:
            if held is None:
                self._index.forget(client, record)
            elif self._remember and held in self._store:
                self._index.only(client, record, held)

    def refused(self, client: str, record: str, holds: Sequence[str] = ()) -> None:
        """A client could not decode its last message: the next one will suit it.

        Args:
            client: its name.
            record: the record's name.
            holds: what it does have, by hash; the next message is self-contained if none of it is
                kept here.
        """
        with self._lock:
            known = next((reference for reference in holds if reference in self._store), NOTHING)
            if self._remember:
                self._index.only(client, record, known)
            log.info("fedpara: client %s lost what it held and is served again", client)

    @property
    def references(self) -> Mapping[str, Tensors]:
        """Everything that some client may take a delta against, by hash."""
        return self._store

    def close(self) -> None:
        """Close the files; another server may go on from the folder."""
        with self._lock:
            self._index.close()
            self._log.close()
            self._store.close()


@dataclass(frozen=True)
class _Job:
    """What is to be sent."""

    record: str
    shared: Tensors
    content: str
    spec: ModelSpec
    codec: Codec
    extra: dict[str, Any]

    @property
    def plain(self) -> bool:
        """Whether contents are sent as they are, without a grid."""
        return self.codec.lossless or not self.codec.needs_reference


def _coarseness(codec: Codec) -> float:
    stated = (stage.options.get("rms") for stage in codec.stages)
    return next((float(value) for value in stated if value), FINE)


def _kind(job: _Job, version: Version, held: str | None) -> Kind:
    if job.plain:
        return "plain"
    if held:
        return "repeat" if held == version.reference else "update"
    return "first" if held is None else "full"
