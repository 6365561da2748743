"""What the server sends, each record coded against what its receiver holds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.common import ArrayRecord, Message, RecordDict
from torch import Tensor

from fedpara_plugins import ConfigError, MismatchError, ModelSpec
from fedpara_plugins.codecs import Codec, reference_hash
from fedpara_plugins.exchange.coding import own_words
from fedpara_plugins.exchange.sizes import Size
from fedpara_plugins.ledger import LayerSize, layer_sizes
from fedpara_plugins.references import GridDownlink, PerClientDownlink, shared_part
from fedpara_plugins_flower.marker import Marker
from fedpara_plugins_flower.records import is_side, payload_record, to_tensors, with_content
from fedpara_plugins_flower.run import Run
from fedpara_plugins_flower.settings import Settings

__all__ = ["Outbox"]

log = logging.getLogger("flwr.fedpara")

State = dict[str, Tensor]


@dataclass(frozen=True)
class _Content:
    """What the strategy sends under one name: strategies send one record object to many nodes."""

    record: ArrayRecord
    spec: ModelSpec
    full: State
    hash: str
    """Of the shared part."""


class Outbox:
    """Encodes the strategy's records, each against what its receiver holds.

    Args:
        run: the run's settings and the models built in it.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._downlink = _downlink(run.settings)
        self._contents: dict[str, _Content] = {}
        self._dtypes: dict[str, dict[str, torch.dtype]] = {}
        self._decoders: dict[int, tuple[str, ...]] = {}
        self._announced: set[str] = set()
        self._told: Counter[str] = Counter()

    # Sending

    def encoded(self, message: Message) -> Message:
        """A new message with payloads in place of the records of arrays."""
        node = message.metadata.dst_node_id
        # A node that has answered once has compared our codecs with its own.
        codecs = () if node in self._decoders else self._run.settings.codec_names
        content = RecordDict(dict(message.content.items()))
        for name, record in message.content.array_records.items():
            current = self._content(name, record)
            coded = self._downlink.encode(
                str(node),
                name,
                current.full,
                spec=current.spec,
                codec=self._codec_for(node),
                decoders=self._decoders.get(node),
                extra=own_words(codecs),
                content=current.hash,
            )
            content[name] = payload_record(coded.payload)
        return with_content(message, content)

    def _codec_for(self, node: int) -> Codec:
        """The downlink's chain with an entropy coder that the client can undo."""
        codec = self._run.settings.downlink.resolved(self._decoders.get(node))
        if codec.stages and codec.name not in self._announced:
            self._announced.add(codec.name)
            log.info("fedpara: downlink codec in use: %s", codec.name)
        return codec

    def _content(self, name: str, record: ArrayRecord) -> _Content:
        known = self._contents.get(name)
        if known is None or known.record is not record:
            full = self._with_first_dtypes(name, to_tensors(record))
            spec = self._spec(name, full)
            known = _Content(record, spec, full, reference_hash(shared_part(spec, full)))
            self._contents[name] = known
        return known

    def _with_first_dtypes(self, name: str, tensors: State) -> State:
        """Cast what a strategy has turned into other dtypes back to what it first sent.

        Several strategies return float64 under NumPy 2, and all of them average integers.
        """
        known = self._run.dtypes
        first = self._dtypes.setdefault(
            name, {k: known.get(k, v.dtype) for k, v in tensors.items()}
        )
        return {key: _cast(value, first.get(key, value.dtype)) for key, value in tensors.items()}

    def _spec(self, name: str, tensors: Mapping[str, Tensor]) -> ModelSpec:
        if is_side(name):
            return ModelSpec(weights={}, keys=tuple(tensors), seed=0)
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
        return self._downlink.references

    def note_reply(self, node: int, marker: Marker) -> None:
        """A client has answered, and said by hash what it holds now, and what it can decode."""
        if marker.decoders:
            self._decoders[node] = tuple(marker.decoders)
        for name, reference in marker.holds.items():
            self._downlink.acknowledge(str(node), name, reference)
        for name, held in marker.has.items():
            self._downlink.refused(str(node), name, held)

    def tell_first_contacts(self) -> None:
        """Log how many clients were sent more than an update since the last time."""
        counts = self._downlink.counts
        first, full = (counts[kind] - self._told[kind] for kind in ("first", "full"))
        if first:
            log.info("fedpara: sent the whole model, coded, to %d clients that are new", first)
        if full:
            log.info("fedpara: sent the whole model, coded, to %d clients that lost it", full)
        self._told = Counter({kind: counts[kind] for kind in ("first", "full")})

    def close(self) -> None:
        """The run is over; files stay for the next one."""
        self._downlink.close()

    def completed(self, name: str, shared: State) -> State:
        """The model's complete state: private names are filled from what the server itself has.

        Strategies then see the same names in every reply that they sent themselves.

        Raises:
            MismatchError: a tensor has another shape than the one of its name that was sent.
        """
        known = self._contents.get(name)
        if known is not None:
            _check_shapes(shared, known.full)
        if known is None or set(shared_part(known.spec, known.full)) != set(shared):
            return shared
        return {key: shared.get(key, value) for key, value in known.full.items()}

    def shared_names(self, name: str) -> tuple[str, ...]:
        """What of the record of that name that was encoded last has been sent, in order."""
        known = self._contents.get(name)
        return () if known is None else tuple(shared_part(known.spec, known.full))

    def last_state(self, name: str) -> State:
        """The complete state that was encoded last under that name."""
        return self._contents[name].full

    def limit(self, name: str) -> int:
        """Bytes that a reply's record may decode to: a model's worth, and some slack."""
        known = self._contents.get(name)
        sizes = [_size(content.full) for content in ([known] if known else self._contents.values())]
        return 2 * max(sizes, default=0) + 1_000_000

    # Accounting

    def size(self, name: str) -> Size:
        """Of the record of that name that was encoded last."""
        return self.size_of(name, self._contents[name].full)

    def layers(self, name: str) -> list[LayerSize]:
        """Of the record of that name that was encoded last, before coding."""
        known = self._contents[name]
        return layer_sizes(shared_part(known.spec, known.full), known.spec)

    def size_of(self, name: str, tensors: Mapping[str, Tensor]) -> Size:
        """Of the shared part of a record's tensors."""
        known = self._contents.get(name)
        spec = known.spec if known is not None else ModelSpec({}, tuple(tensors), seed=0)
        if is_side(name):  # a dense model's variates would be as large as the dense model
            specs = self._run.specs.values()
            spec = next((s for s in specs if set(tensors) <= set(s.keys)), spec)
        shared = shared_part(spec, tensors)
        return Size(len(shared), _size(shared), spec.dense_bytes(shared))


def _downlink(settings: Settings) -> PerClientDownlink | GridDownlink:
    memory = int(settings.reference_memory * 2**20)
    folder = settings.state_dir and settings.state_dir / "server" / "references"
    if settings.references == "grid":
        return GridDownlink(folder=folder, memory_bytes=memory)
    return PerClientDownlink(folder=folder, memory_bytes=memory)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dtype == dtype:
        return value
    if not dtype.is_floating_point and value.is_floating_point():
        value = value.round()
    return value.to(dtype)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _check_shapes(answer: State, sent: State) -> None:
    """One client's odd shapes would end the round of all: no strategy can average them."""
    for key, value in answer.items():
        if key in sent and value.shape != sent[key].shape:
            raise MismatchError(
                f"the client answers with {key!r} of shape {tuple(value.shape)}, this server sent "
                f"it with shape {tuple(sent[key].shape)}; build the same model on both sides"
            )
