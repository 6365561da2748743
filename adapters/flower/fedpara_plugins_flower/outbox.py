"""What the server sends: encoding against what each client holds, and the book about that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.common import ArrayRecord, Message, RecordDict
from torch import Tensor

from fedpara_plugins import ConfigError, ModelSpec
from fedpara_plugins.codecs import Codec, reference_hash
from fedpara_plugins.ledger import LayerSize, layer_sizes
from fedpara_plugins_flower.accounting import Size
from fedpara_plugins_flower.coding import decode, encode, shared_part
from fedpara_plugins_flower.records import payload_record, to_tensors, with_content
from fedpara_plugins_flower.run import Run

__all__ = ["Outbox"]

log = logging.getLogger("flwr.fedpara")

State = dict[str, Tensor]
Slot = tuple[int, str]
"""A record of a node: its id and the record's name."""

OWN_MESSAGE = 2**62
"""The limit for decoding a message of one's own."""


@dataclass
class _Encodings:
    """The payloads of one record object, each with the hash of what it decodes to.

    They differ by reference, and by the chain that the client can decode.
    """

    record: ArrayRecord
    content: str
    payloads: dict[tuple[str | None, str], tuple[bytes, str]] = field(default_factory=dict)


class Outbox:
    """Encodes the strategy's records and remembers what each client has of them.

    A downlink is coded against what that very client holds; clients that hold the same (by hash)
    share one copy of it here and one encoding.

    Args:
        run: the run's settings and the models built in it.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._references: dict[str, State] = {}
        self._coded_from: dict[str | None, str] = {}
        self._held: dict[Slot, str] = {}
        self._in_flight: dict[Slot, str] = {}
        self._full: dict[str, tuple[ModelSpec, State]] = {}
        self._dtypes: dict[str, dict[str, torch.dtype]] = {}
        self._encoded: dict[str, _Encodings] = {}
        self._decoders: dict[int, tuple[str, ...]] = {}
        self._announced: set[str] = set()

    # Sending

    def encoded(self, message: Message) -> Message:
        """A new message with payloads in place of the records of arrays."""
        content = RecordDict(dict(message.content.items()))
        for name, record in message.content.array_records.items():
            slot = (message.metadata.dst_node_id, name)
            codec = self._codec_for(message.metadata.dst_node_id)
            payload, reference = self._payload(name, record, self._held.get(slot), codec)
            self._in_flight[slot] = reference
            content[name] = payload_record(payload)
        return with_content(message, content)

    def forget_held(self, message: Message) -> None:
        """Note that the client of a message holds nothing any more."""
        for name in message.content.array_records:
            self._held.pop((message.metadata.dst_node_id, name), None)

    def _codec_for(self, node: int) -> Codec:
        """The downlink's chain with an entropy coder that the client can undo."""
        codec = self._run.settings.downlink.resolved(self._decoders.get(node))
        if codec.stages and codec.name not in self._announced:
            self._announced.add(codec.name)
            log.info("fedpara: downlink codec in use: %s", codec.name)
        return codec

    def _payload(
        self, name: str, record: ArrayRecord, held: str | None, codec: Codec
    ) -> tuple[bytes, str]:
        """The payload, and the hash of what the client will have decoded from it.

        Strategies send one record object to many nodes: it is encoded once per reference.
        """
        known = self._encoded.get(name)
        if known is None or known.record is not record:
            tensors = self._with_first_dtypes(name, to_tensors(record))
            spec = self._spec(name, tensors)
            self._full[name] = (spec, tensors)
            known = _Encodings(record, reference_hash(shared_part(spec, tensors)))
            self._encoded[name] = known
        key = (held, codec.name)
        if key not in known.payloads:
            known.payloads[key] = self._encode(name, known.content, held, codec)
        return known.payloads[key]

    def _encode(self, name: str, content: str, held: str | None, codec: Codec) -> tuple[bytes, str]:
        spec, tensors = self._full[name]
        reference = self._references.get(held) if held else None
        if reference is not None and self._coded_from.get(held) == content:
            # The client has its coded form already (to evaluate it, say, and now to train on it):
            # "no change" costs next to nothing, the rounding that is left would cost a message.
            tensors = reference
        payload, _ = encode(tensors, spec=spec, codec=codec, reference=reference)
        if not self._run.settings.needs_reference:
            return payload, content
        # Decoded again here, since a lossy codec leaves the client with other values.
        received = decode(payload, references=self._references, limit=OWN_MESSAGE).tensors
        digest = reference_hash(received)
        self._references[digest] = received
        self._coded_from[digest] = content
        return payload, digest

    def _with_first_dtypes(self, name: str, tensors: State) -> State:
        """Cast what a strategy has turned into other dtypes back to what it first sent.

        Several strategies return float64 under NumPy 2, and all of them average integers.
        """
        first = self._dtypes.setdefault(name, {k: v.dtype for k, v in tensors.items()})
        return {key: _cast(value, first.get(key, value.dtype)) for key, value in tensors.items()}

    def _spec(self, name: str, tensors: Mapping[str, Tensor]) -> ModelSpec:
        spec = self._run.specs.get(frozenset(tensors))
        if spec is not None:
            return spec
        config = self._run.settings.config
        if config.method == "none" and not config.private:
            return ModelSpec(weights={}, keys=tuple(tensors), seed=0)
        for known in self._run.specs.values():
            if set(tensors) <= set(known.keys):
                return known
        wanted = f"method {config.method!r}" if config.method != "none" else "the option 'private'"
        raise ConfigError(
            f"fedpara: {wanted} is on, but the server sends a "
            f"record {name!r} that belongs to no converted model (its first name is "
            f"{next(iter(tensors), None)!r}). Add to the server, after the imports: "
            f"Net = fedpara.factorised(Net)"
        )

    # Receiving

    @property
    def references(self) -> Mapping[str, State]:
        """Everything that some client may have taken a delta against, by hash."""
        return self._references

    def note_reply(self, node: int, holds: Mapping[str, str], decoders: Sequence[str] = ()) -> None:
        """A client has answered, and said by hash what it holds now, and what it can decode."""
        if decoders:
            self._decoders[node] = tuple(decoders)
        for slot in [slot for slot in self._in_flight if slot[0] == node]:
            del self._in_flight[slot]
        for name, reference in holds.items():
            if reference in self._references:
                self._held[node, name] = reference

    def completed(self, name: str, shared: State) -> State:
        """The model's complete state: private names are filled from what the server itself has.

        Strategies then see the same names in every reply that they sent themselves.
        """
        if name not in self._full:
            return shared
        spec, full = self._full[name]
        if set(shared_part(spec, full)) != set(shared):
            return shared
        return {key: shared[key] if key in shared else full[key] for key in full}

    def last_state(self, name: str) -> State:
        """The complete state that was encoded last under that name."""
        return self._full[name][1]

    def limit(self, name: str) -> int:
        """Bytes that a reply's record may decode to: a model's worth, and some slack."""
        if name in self._full:
            state = self._full[name][1]
        else:
            state = max((full for _, full in self._full.values()), key=_size, default={})
        return 2 * _size(state) + 1_000_000

    def forget_unused(self) -> None:
        """Drop what no client holds or may just be receiving."""
        used = {*self._held.values(), *self._in_flight.values()}
        self._references = {k: v for k, v in self._references.items() if k in used}
        self._coded_from = {k: v for k, v in self._coded_from.items() if k in used}

    # Accounting

    def size(self, name: str) -> Size:
        """Of the record of that name that was encoded last."""
        return self.size_of(name, self._full[name][1])

    def layers(self, name: str) -> list[LayerSize]:
        """Of the record of that name that was encoded last, before coding."""
        spec, full = self._full[name]
        return layer_sizes(shared_part(spec, full), spec)

    def size_of(self, name: str, tensors: Mapping[str, Tensor]) -> Size:
        """Of the shared part of a record's tensors."""
        if name not in self._full:
            return Size(len(tensors), _size(tensors), _size(tensors))
        spec = self._full[name][0]
        shared = shared_part(spec, tensors)
        return Size(len(shared), _size(shared), spec.dense_bytes(shared))


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dtype == dtype:
        return value
    if not dtype.is_floating_point and value.is_floating_point():
        value = value.round()
    return value.to(dtype)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())
