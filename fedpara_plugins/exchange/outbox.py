"""What a server sends, each record coded against what its receiver holds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpara_plugins.codecs import Codec, reference_hash
from fedpara_plugins.errors import MismatchError
from fedpara_plugins.exchange.coding import own_words
from fedpara_plugins.exchange.settings import ExchangeSettings
from fedpara_plugins.exchange.sizes import Size, size_of, tensor_bytes
from fedpara_plugins.ledger import LayerSize, layer_sizes
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references import GridDownlink, PerClientDownlink, shared_tensors

__all__ = ["Outbox", "cast", "downlink_of"]

log = logging.getLogger("fedpara")

State = dict[str, Tensor]

SLACK = 1_000_000
"""Bytes that a reply may have beyond twice the model."""


@dataclass(frozen=True)
class _Content:
    spec: ModelSpec
    full: State
    hash: str
    """Of the shared part."""
    sized_as: ModelSpec


class Outbox:
    """Holds what is to be sent under each record's name, and codes it for each client.

    Args:
        settings: the codecs, and how downlinks are coded.
    """

    def __init__(self, settings: ExchangeSettings) -> None:
        self._settings = settings
        self._downlink = downlink_of(settings)
        self._contents: dict[str, _Content] = {}
        self._decoders: dict[str, tuple[str, ...]] = {}
        self._announced: set[str] = set()
        self._told: Counter[str] = Counter()

    # Sending

    def put(
        self, record: str, full: State, spec: ModelSpec, *, sized_as: ModelSpec | None = None
    ) -> None:
        """What is sent under that name from now on.

        Args:
            record: its name.
            full: tensors, not changed afterwards; the model's private names allowed (left out).
            spec: the model that they belong to.
            sized_as: of the model whose dense size theirs is compared with: an optimizer's
                variates belong to no model, and a dense model's would be as large as itself.
        """
        digest = reference_hash(shared_tensors(spec, full))
        self._contents[record] = _Content(spec, full, digest, sized_as or spec)

    def holds(self, record: str) -> bool:
        """Whether anything is sent under that name."""
        return record in self._contents

    def content(self, record: str) -> State:
        """What is sent under that name, private names too; not to be changed."""
        return self._contents[record].full

    def shared_names(self, record: str) -> tuple[str, ...]:
        """The names of it that are sent, in order."""
        known = self._contents[record]
        return tuple(shared_tensors(known.spec, known.full))

    def encode(self, client: str, record: str) -> bytes:
        """The payload of a record for one client.

        Raises:
            PayloadError: a tensor cannot be coded.
        """
        # A client that has answered once has compared our codecs with its own.
        codecs = () if client in self._decoders else self._settings.codec_names
        current = self._contents[record]
        coded = self._downlink.encode(
            client,
            record,
            current.full,
            spec=current.spec,
            codec=self._codec_for(client),
            decoders=self._decoders.get(client),
            extra=own_words(codecs),
            content=current.hash,
        )
        return coded.payload

    def _codec_for(self, client: str) -> Codec:
        """The downlink's chain with an entropy coder that the client can undo."""
        codec = self._settings.downlink.resolved(self._decoders.get(client))
        if codec.stages and codec.name not in self._announced:
            self._announced.add(codec.name)
            log.info("fedpara: downlink codec in use: %s", codec.name)
        return codec

    # Receiving

    @property
    def references(self) -> Mapping[str, State]:
        """Everything that some client may have taken a delta against, by hash."""
        return self._downlink.references

    def acknowledge(
        self, client: str, holds: Mapping[str, str], decoders: Collection[str] = ()
    ) -> None:
        """A client has answered: by record, the hash of what it holds; and what it can decode."""
        if decoders:
            self._decoders[client] = tuple(decoders)
        for record, reference in holds.items():
            self._downlink.acknowledge(client, record, reference)

    def refused(self, client: str, has: Mapping[str, Sequence[str]]) -> None:
        """A client lost what a message was coded against: by record, the hashes that it has.

        Records that were never sent are ignored: a client may name as many as it likes.
        """
        for record, held in has.items():
            if record in self._contents:
                self._downlink.refused(client, record, held)

    def tell_first_contacts(self) -> None:
        """Log how many clients were sent more than an update since the last time."""
        counts = self._downlink.counts
        first, full = (counts[kind] - self._told[kind] for kind in ("first", "full"))
        if first:
            log.info("fedpara: sent the whole model, coded, to %d clients that are new", first)
        if full:
            log.info("fedpara: sent the whole model, coded, to %d clients that lost it", full)
        self._told = Counter({kind: counts[kind] for kind in ("first", "full")})

    def completed(self, record: str, shared: State, *, partial: bool = False) -> State:
        """The complete state: private names are filled from what the server itself has.

        Args:
            record: its name.
            shared: what a client answers.
            partial: whether other names than those sent are allowed; they are left as they are.

        Raises:
            MismatchError: a tensor has another shape than the one of its name that was sent, or
                other names came.
        """
        known = self._contents[record]
        _check_shapes(shared, known.full)
        unlike = sorted(set(self.shared_names(record)) ^ shared.keys())
        if unlike and partial:
            return shared
        if unlike:
            raise MismatchError(
                f"the client answers with other names than this server sent: {unlike[:5]} "
                f"({len(unlike)} differ); build the same model on both sides"
            )
        return {key: shared.get(key, value) for key, value in known.full.items()}

    def spec(self, record: str) -> ModelSpec:
        """The model that the record belongs to."""
        return self._contents[record].spec

    def limit(self, record: str | None) -> int:
        """Bytes that a reply's record may decode to: a model's worth, and some slack.

        Args:
            record: its name; None, or an unknown one, for the largest of all.
        """
        known = self._contents.get(record or "")
        found = [known] if known else self._contents.values()
        return 2 * max((tensor_bytes(content.full) for content in found), default=0) + SLACK

    # Accounting

    def size(self, record: str) -> Size:
        """Of what is sent under that name."""
        known = self._contents[record]
        return size_of(shared_tensors(known.spec, known.full), known.sized_as)

    def layers(self, record: str) -> list[LayerSize]:
        """Of what is sent under that name, before coding."""
        known = self._contents[record]
        return layer_sizes(shared_tensors(known.spec, known.full), known.spec)

    def close(self) -> None:
        """The run is over; files stay for the next one."""
        self._downlink.close()


def downlink_of(settings: ExchangeSettings) -> PerClientDownlink | GridDownlink:
    """The scheme of downlinks that the settings ask for."""
    memory = int(settings.reference_memory * 2**20)
    folder = settings.state_dir and settings.state_dir / "server" / "references"
    if settings.references == "grid":
        return GridDownlink(folder=folder, memory_bytes=memory)
    return PerClientDownlink(folder=folder, memory_bytes=memory)


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype, rounded where that holds integers."""
    if value.dtype == dtype:
        return value
    if not dtype.is_floating_point and value.is_floating_point():
        value = value.round()
    return value.to(dtype)


def _check_shapes(answer: State, sent: State) -> None:
    """One client's odd shapes would end the round of all: nothing can average them."""
    for key, value in answer.items():
        if key in sent and value.shape != sent[key].shape:
            raise MismatchError(
                f"the client answers with {key!r} of shape {tuple(value.shape)}, this server sent "
                f"it with shape {tuple(sent[key].shape)}; build the same model on both sides"
            )
