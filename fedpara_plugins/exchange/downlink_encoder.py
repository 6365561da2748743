"""A server's messages: each record is encoded against what its receiver holds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedpara_plugins.codecs import JOINT, Codec, Description, Roll, RollRow, reference_hash
from fedpara_plugins.exchange.descriptions import SharedDescriptions
from fedpara_plugins.exchange.frozen import FrozenAgreement
from fedpara_plugins.exchange.headers import downlink_form, header_extra
from fedpara_plugins.exchange.outliers import update_norm
from fedpara_plugins.exchange.records import State
from fedpara_plugins.exchange.rolls import JOINT_RECORD, SharedRolls, joined
from fedpara_plugins.exchange.settings import ExchangeSettings
from fedpara_plugins.exchange.sizes import Size, size_of
from fedpara_plugins.ledger import LayerSize, layer_sizes
from fedpara_plugins.models.infinities import OwnInfinities
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references import (
    EncodedDownlink,
    GridDownlink,
    PerClientDownlink,
    shared_tensors,
)
from fedpara_plugins.support import Outages

__all__ = ["DownlinkEncoder", "downlink_of"]

log = logging.getLogger("fedpara")


@dataclass(frozen=True)
class _Content:
    """A record to be sent; see `DownlinkEncoder.put`. The hash is that of the shared part."""

    spec: ModelSpec
    full: State
    hash: str
    sized_as: ModelSpec


class DownlinkEncoder:
    """The records that a server sends, encoded for each client.

    Args:
        settings: the codecs, and how downlinks are coded.
        outages: gets what cannot be written; None logs it alone.
    """

    def __init__(self, settings: ExchangeSettings, outages: Outages | None = None) -> None:
        self._settings = settings
        self._downlink = downlink_of(settings, outages)
        self._contents: dict[str, _Content] = {}
        self._decoders: dict[str, tuple[str, ...]] = {}
        self._descriptions = SharedDescriptions()
        self._rolls = SharedRolls()
        self._announced: set[str] = set()
        self._told: Counter[str] = Counter()
        self._norms: dict[str, tuple[str, float]] = {}
        self._infinities: dict[str, OwnInfinities] = {}
        self._frozen = FrozenAgreement()

    # Sending

    def put(
        self,
        record: str,
        full: State,
        spec: ModelSpec,
        *,
        sized_as: ModelSpec | None = None,
        frozen: Mapping[str, Tensor] | None = None,
        buffers: Collection[str] = (),
    ) -> None:
        """Send these tensors under a name from now on.

        Infinities of the first ones, such as those of a mask, are given back to all later ones.

        Args:
            record: its name.
            full: tensors, not changed afterwards; the private names of the model are left out.
            spec: the model that they belong to.
            sized_as: the model whose dense size theirs is compared with, if it is another. An
                optimizer's variates belong to no model, and those of a dense model would be as
                large as itself.
            frozen: those of the tensors that are frozen, as the server's model holds them; what
                counts is what they are when the record is first put. They are sent to nobody but
                clients that lack them (`frozen_payload`).
            buffers: those of ``frozen`` that are buffers: a client that changes one sends it.

        Raises:
            PayloadError: values became NaN or infinite since the first ones.
        """
        # First, since the mean of a frozen mask's infinities may be NaN, and is no change.
        full = self._infinities.setdefault(record, OwnInfinities()).restored(full)
        if self._settings.leaves_frozen:
            full, spec = self._frozen.settle(record, full, spec, frozen or {}, buffers)
        shared = shared_tensors(spec, full)
        self._contents[record] = _Content(spec, full, reference_hash(shared), sized_as or spec)
        self._descriptions.put(record, Description.of(spec.to_json(), shared))

    @property
    def records(self) -> tuple[str, ...]:
        """The names of the records that are sent."""
        return tuple(self._contents)

    def has_record(self, record: str) -> bool:
        """Return whether a record of this name is sent."""
        return record in self._contents

    def spec(self, record: str) -> ModelSpec:
        """Return the model that a record belongs to."""
        return self._contents[record].spec

    def content(self, record: str) -> State:
        """Return the tensors of a record, private names too; not to be changed."""
        return self._contents[record].full

    def shared_names(self, record: str) -> tuple[str, ...]:
        """Return the names of a record that are sent, in order."""
        known = self._contents[record]
        return tuple(shared_tensors(known.spec, known.full))

    def norm(self, record: str) -> float:
        """Return the norm of what is sent under a name, computed once for each content."""
        known = self._contents[record]
        digest, norm = self._norms.get(record, ("", 0.0))
        if digest != known.hash:
            norm = update_norm(shared_tensors(known.spec, known.full))
            self._norms[record] = known.hash, norm
        return norm

    def encode_all(self, client: str, records: Collection[str]) -> dict[str, bytes]:
        """Return the payloads of a message for one client: one of all records, if it reads that.

        Args:
            client: its name.
            records: their names, in order.

        Raises:
            PayloadError: a tensor cannot be encoded.
        """
        coded = {record: self._encoded(client, record) for record in records}
        payloads = {record: each.payload for record, each in coded.items()}
        if len(coded) < 2:
            return payloads
        known = self._rolls.held(client, records)
        rows = []
        for record, each in coded.items():
            described = self._descriptions.current(record).digest
            count = len(self.shared_names(record))
            rows.append(RollRow(record, described, each.reference, count))
        self._rolls.note_sent(client, Roll(tuple(rows)))
        if JOINT not in self._decoders.get(client, ()):
            return payloads
        return joined(payloads, known, {row.name: row.tensors for row in rows})

    def encode(self, client: str, record: str) -> bytes:
        """Return the payload of a record for one client.

        Raises:
            PayloadError: a tensor cannot be encoded.
        """
        return self._encoded(client, record).payload

    def _encoded(self, client: str, record: str) -> EncodedDownlink:
        # A client that has answered once has compared our codecs with its own.
        codecs = () if client in self._decoders else self._settings.codec_names
        current = self._contents[record]
        decoders = self._decoders.get(client)
        described = self._descriptions.current(record)
        form = downlink_form(decoders, described, self._descriptions.held(client, record))
        coded = self._downlink.encode(
            client,
            record,
            current.full,
            spec=current.spec,
            codec=self._codec_for(client),
            decoders=decoders,
            extra=header_extra(codecs),
            content=current.hash,
            form=form,
        )
        self._descriptions.note_sent(client, record)
        return coded

    def frozen_payload(self, client: str, record: str) -> bytes | None:
        """Return a record's frozen tensors for a client that lacks them, once; else None."""
        return self._frozen.payload_for(client, record)

    def frozen_size(self, record: str) -> Size:
        """Return the size of a record's frozen tensors, before coding."""
        return self._frozen.size(record)

    def _codec_for(self, client: str) -> Codec:
        """Return the downlink's chain with an entropy coder that the client can undo."""
        codec = self._settings.downlink.resolved(self._decoders.get(client))
        if codec.stages and codec.name not in self._announced:
            self._announced.add(codec.name)
            log.info("fedpara: downlink codec in use: %s", codec.name)
        return codec

    # Receiving

    @property
    def references(self) -> Mapping[str, State]:
        """By hash, everything that some client may have taken a delta against."""
        return self._downlink.references

    @property
    def descriptions(self) -> Mapping[str, Description]:
        """By hash, the descriptions of what was sent, to which headers of replies may refer."""
        return self._descriptions.known

    @property
    def rolls(self) -> Mapping[str, Roll]:
        """By hash, the rolls of what was sent, to which joint payloads of replies may refer."""
        return self._rolls

    def acknowledge(
        self, client: str, holds: Mapping[str, str], decoders: Collection[str] = ()
    ) -> None:
        """Record what a client states in its reply.

        Args:
            client: its name.
            holds: by record, the hash of what it holds.
            decoders: names of what it can decode; () if it did not say.
        """
        if decoders:
            self._decoders[client] = tuple(decoders)
        for record, reference in holds.items():
            self._downlink.acknowledge(client, record, reference)
            self._descriptions.note_held(client, record)
        self._rolls.note_held(client, holds)

    def note_refusal(self, client: str, has: Mapping[str, Sequence[str]]) -> None:
        """Record that a client lost the reference that a message was coded against.

        The next header for it is written whole.

        Args:
            client: its name.
            has: by record, the hashes that it has. Records that were never sent are ignored, since
                a client may name as many as it likes. The record of all records stands for those of
                the client's last message.
        """
        self._descriptions.forget(client)
        self._rolls.forget(client)
        if JOINT_RECORD in has:
            has = {**dict.fromkeys(self._rolls.sent_to(client), ()), **has}
        for record, held in has.items():
            if record in self._contents:
                self._downlink.refused(client, record, held)
                if not held:
                    self._frozen.note_lost(client, record)

    def note_failure(self, client: str) -> None:
        """Record that a client answered with an error.

        Its program may be an older release by now, so nothing is known of what it decodes until it
        says so again.

        Args:
            client: its name.
        """
        self._descriptions.forget(client)
        self._rolls.forget(client)
        self._decoders.pop(client, None)

    def note_lacking(self, client: str, records: Collection[str]) -> None:
        """Record that a client has no frozen tensors of its own for some records.

        Args:
            client: its name.
            records: as it names them; what has no frozen tensors is ignored.
        """
        lacking = self._frozen.note_lacking(client, records)
        if client not in self._decoders:
            self._told["first"] += lacking  # it is sent its first message once more

    def note_changed(self, record: str, names: Collection[str]) -> None:
        """Record that a client has changed frozen buffers: whatever becomes of them is sent."""
        self._frozen.note_changed(record, names)

    def log_first_contacts(self) -> None:
        """Log how many clients got a whole model instead of an update since the last call."""
        counts = self._downlink.counts
        first, full = (counts[kind] - self._told[kind] for kind in ("first", "full"))
        if first > 0:  # negative where a client that is known lacked frozen tensors
            log.info("fedpara: sent the whole model, coded, to %d clients that are new", first)
        if full:
            log.info("fedpara: sent the whole model, coded, to %d clients that lost it", full)
        self._told = Counter({kind: counts[kind] for kind in ("first", "full")})

    # Accounting

    def size(self, record: str) -> Size:
        """Return the size of what is sent under a name, before coding.

        Without the plugin, frozen tensors would be sent too: they count as dense bytes.
        """
        known = self._contents[record]
        frozen = Size(dense=self._frozen.nbytes(record))
        return size_of(shared_tensors(known.spec, known.full), known.sized_as) + frozen

    def layers(self, record: str) -> list[LayerSize]:
        """Return the sizes by layer of what is sent under a name, before coding; frozen ones too.

        Of a frozen tensor nothing is sent, and its dense layer counts.
        """
        known = self._contents[record]
        frozen = layer_sizes(self._frozen.values(record), known.spec)
        return [
            *layer_sizes(shared_tensors(known.spec, known.full), known.spec),
            *(replace(layer, tensors=0, raw_bytes=0) for layer in frozen),
        ]

    def close(self) -> None:
        """End the run; files stay for the next one."""
        self._downlink.close()


def downlink_of(
    settings: ExchangeSettings, outages: Outages | None = None
) -> PerClientDownlink | GridDownlink:
    """Return the scheme of downlinks that the settings ask for.

    Args:
        settings: of the run.
        outages: gets what cannot be written; None logs it alone.
    """
    memory = int(settings.reference_memory * 2**20)
    folder = settings.state_dir and settings.state_dir / "server" / "references"
    if settings.references == "grid":
        return GridDownlink(folder=folder, memory_bytes=memory, outages=outages)
    return PerClientDownlink(folder=folder, memory_bytes=memory, outages=outages)
