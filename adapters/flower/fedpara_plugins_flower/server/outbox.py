"""What the server sends, each record coded against what its receiver holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.common import ArrayRecord, Message, RecordDict
from torch import Tensor

from fedpara_plugins import ConfigError, ModelSpec
from fedpara_plugins.exchange import Outbox as CoreOutbox
from fedpara_plugins.exchange import Size, cast, size_of
from fedpara_plugins.ledger import LayerSize
from fedpara_plugins.references import shared_tensors
from fedpara_plugins_flower.messages.records import (
    is_side,
    payload_record,
    to_tensors,
    with_content,
)
from fedpara_plugins_flower.messages.reply_marker import Marker
from fedpara_plugins_flower.run import Run

__all__ = ["Outbox"]

State = dict[str, Tensor]


class Outbox:
    """Encodes the strategy's records, each against what its receiver holds.

    Args:
        run: the run's settings and the models built in it.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._core = CoreOutbox(run.settings)
        # Strategies send one record object to many nodes.
        self._records: dict[str, ArrayRecord] = {}
        self._dtypes: dict[str, dict[str, torch.dtype]] = {}

    # Sending

    def encoded(self, message: Message) -> Message:
        """A new message with payloads in place of the records of arrays."""
        client = str(message.metadata.dst_node_id)
        content = RecordDict(dict(message.content.items()))
        for name, record in message.content.array_records.items():
            self._put(name, record)
            content[name] = payload_record(self._core.encode(client, name))
        return with_content(message, content)

    def _put(self, name: str, record: ArrayRecord) -> None:
        if self._records.get(name) is not record:
            full = self._with_first_dtypes(name, to_tensors(record))
            spec = self._spec(name, full)
            sized_as = self._model_of(full) if is_side(name) else None
            self._core.put(name, full, spec, sized_as=sized_as)
            self._records[name] = record

    def _with_first_dtypes(self, name: str, tensors: State) -> State:
        """Cast what a strategy has turned into other dtypes back to what it first sent.

        Several strategies return float64 under NumPy 2, and all of them average integers.
        """
        known = self._run.dtypes
        first = self._dtypes.setdefault(
            name, {k: known.get(k, v.dtype) for k, v in tensors.items()}
        )
        return {key: cast(value, first.get(key, value.dtype)) for key, value in tensors.items()}

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

    def _model_of(self, tensors: Mapping[str, Tensor]) -> ModelSpec | None:
        """The model among whose names these are."""
        specs = self._run.specs.values()
        return next((spec for spec in specs if set(tensors) <= set(spec.keys)), None)

    # Receiving

    @property
    def references(self) -> Mapping[str, State]:
        """Everything that some client may have taken a delta against, by hash."""
        return self._core.references

    def note_reply(self, node: int, marker: Marker) -> None:
        """A client has answered, and said by hash what it holds now, and what it can decode."""
        self._core.acknowledge(str(node), marker.holds, marker.decoders)
        self._core.refused(str(node), marker.has)

    def tell_first_contacts(self) -> None:
        """Log how many clients were sent more than an update since the last time."""
        self._core.tell_first_contacts()

    def close(self) -> None:
        """The run is over; files stay for the next one."""
        self._core.close()

    def completed(self, name: str, shared: State) -> State:
        """The model's complete state: private names are filled from what the server itself has.

        Strategies then see the same names in every reply that they sent themselves.

        Raises:
            MismatchError: a tensor has another shape than the one of its name that was sent.
        """
        if not self._core.holds(name):
            return shared
        return self._core.completed(name, shared, partial=True)

    def shared_names(self, name: str) -> tuple[str, ...]:
        """What of the record of that name that was encoded last has been sent, in order."""
        return self._core.shared_names(name) if self._core.holds(name) else ()

    def last_state(self, name: str) -> State:
        """The complete state that was encoded last under that name."""
        return self._core.content(name)

    def limit(self, name: str) -> int:
        """Bytes that a reply's record may decode to: a model's worth, and some slack."""
        return self._core.limit(name)

    # Accounting

    def size(self, name: str) -> Size:
        """Of the record of that name that was encoded last."""
        return self._core.size(name)

    def layers(self, name: str) -> list[LayerSize]:
        """Of the record of that name that was encoded last, before coding."""
        return self._core.layers(name)

    def size_of(self, name: str, tensors: Mapping[str, Tensor]) -> Size:
        """Of the shared part of a record's tensors."""
        known = self._core.spec(name) if self._core.holds(name) else None
        spec = known or ModelSpec({}, tuple(tensors), seed=0)
        if is_side(name):
            spec = self._model_of(tensors) or spec
        return size_of(shared_tensors(spec, tensors), spec)
