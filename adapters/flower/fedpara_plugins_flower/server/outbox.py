"""Encoding of the strategy's messages, each record against what its receiver holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from fedpara_plugins import ModelSpec
from fedpara_plugins.exchange import (
    DownlinkEncoder,
    RecordModels,
    ReplyReader,
    cast,
    frozen_record,
    plain_spec,
)
from fedpara_plugins_flower.logs import log
from fedpara_plugins_flower.messages.other_runs import note_other_runs
from fedpara_plugins_flower.messages.records import (
    is_optimizer_record,
    kind_of,
    payload_record,
    place_payloads,
    to_tensors,
    with_content,
)
from fedpara_plugins_flower.messages.reply_marker import Marker
from fedpara_plugins_flower.run import Run
from fedpara_plugins_flower.server.requests import Request

__all__ = ["Outbox"]

State = dict[str, Tensor]
NOTHING: tuple[State, frozenset[str]] = ({}, frozenset())

ADD_LINE = "Add to the server, after the imports: Net = fedpara.factorised(Net)"
IN_PLACE = (
    "A file of the server's builds the plain model: put @fedpara.factorised on the line above the "
    "model's class, where it is defined"
)


class Outbox(DownlinkEncoder):
    """Encodes the strategy's records, each against what its receiver holds.

    Args:
        run: the run's settings and the models built in it.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run.settings, run.outages)
        self._run = run
        # Strategies send one record object to many nodes.
        self._records: dict[str, ArrayRecord] = {}
        self._dtypes: dict[str, dict[str, torch.dtype]] = {}
        self._started: set[str] = set()
        self._models = RecordModels(run.settings.config, add_line=ADD_LINE, in_place=IN_PLACE)

    # Sending

    def encode_message(self, message: Message) -> Message:
        """Return a new message with payloads in the place of the records of arrays."""
        client = str(message.metadata.dst_node_id)
        content = RecordDict(dict(message.content.items()))
        note_other_runs(content, self._run.other_runs())
        for name, record in message.content.array_records.items():
            self._put(name, record)
        names = tuple(message.content.array_records)
        place_payloads(content, self.encode_all(client, names), names)
        for name in names:
            if (frozen := self.frozen_payload(client, name)) is not None:
                content[frozen_record(name)] = payload_record(frozen)
        return with_content(message, content)

    def _put(self, name: str, record: ArrayRecord) -> None:
        if self._records.get(name) is not record:
            full = self._with_first_dtypes(name, to_tensors(record))
            spec = self._spec(name, full)
            sized_as = self._model_of(full) if is_optimizer_record(name) else None
            frozen, buffers = self._frozen_of(name, full)
            self.put(name, full, spec, sized_as=sized_as, frozen=frozen, buffers=buffers)
            self._records[name] = record

    def _frozen_of(self, name: str, tensors: State) -> tuple[State, frozenset[str]]:
        """Return a record's frozen tensors when it is first sent, and which ones are buffers."""
        first = name not in self._started and not is_optimizer_record(name)
        if not first or not self._run.settings.leaves_frozen:
            return NOTHING
        self._started.add(name)
        found = self._run.frozen_in(tensors)
        if found is None:
            if not self._run.specs:
                log.info(
                    "fedpara: the server has built no model with the plugin, so that nothing says "
                    "which parameters are frozen: all of record %r is sent. %s", name, ADD_LINE,
                )  # fmt: skip
            return NOTHING
        return found

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
        if is_optimizer_record(name):
            return plain_spec(tensors)
        return self._models.find(name, tensors, self._run.models)

    def _model_of(self, tensors: Mapping[str, Tensor]) -> ModelSpec | None:
        """Return the model among whose names these are."""
        specs = self._run.specs.values()
        return next((spec for spec in specs if set(tensors) <= set(spec.keys)), None)

    # Receiving

    def reader(self, request: Request) -> ReplyReader:
        """Return what reads one reply to a request.

        A part of a model's names, or a record of the app's own, is the strategy's business; the
        lists of the legacy API are complete, and hold nothing else.
        """
        return ReplyReader(
            self,
            kind_of=kind_of,
            model_of=self._model_of,
            strict=request.legacy,
            asked=request.side,
            own=not request.legacy,
        )

    def note_reply(self, node: int, marker: Marker) -> None:
        """Take in what a client has said: by hash what it holds, and what it can decode."""
        self.acknowledge(str(node), marker.holds, marker.decoders)
        if marker.lost:
            self.note_refusal(str(node), marker.has)
        self.note_lacking(str(node), marker.lacks)
