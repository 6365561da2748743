"""Counts the bytes of every message that carries arrays, and says what a round cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from flwr.app import ArrayRecord, Message

from fedpara_plugins import FedParaConfig, Ledger, LedgerEntry, __version__
from fedpara_plugins.exchange import Size, codec_text
from fedpara_plugins.ledger import LayerSize, RunStart
from fedpara_plugins_flower.messages.records import array_bytes, raw_bytes, value_bytes
from fedpara_plugins_flower.privacy.secagg import masked_bytes
from fedpara_plugins_flower.server.evaluation import ClientMetrics, scalars

__all__ = ["Accounting", "Direction"]

log = logging.getLogger("flwr.fedpara")

Direction = Literal["up", "down"]


class Accounting:
    """The run's ledger, fed with Flower's messages.

    Bytes are those of the arrays as Flower serialises them (the payload, or NumPy arrays with their
    headers); names, metrics and the transport's own framing are not counted.

    Args:
        path: of the ledger's file, or None to keep it in memory.
        config: of the run, for the ledger's first line; None leaves that out.
    """

    def __init__(self, path: Path | None, config: FedParaConfig | None = None) -> None:
        self.ledger = Ledger(path)
        self._round = 0
        self._described = path is None
        self._evaluated = ClientMetrics()
        if config is not None:
            self.ledger.describe(
                RunStart(version=__version__, method=config.method, codec=codec_text(config))
            )

    def sent(self, message: Message, size: Size) -> None:
        """Enter a message to a client, as it travels; a new round logs the one before."""
        found = _round_of(message)
        if found is not None and found != self._round:
            self.log_round()
            self._round = found
        self._enter(message, "down", message.metadata.dst_node_id, size)

    def received(self, message: Message, size: Size) -> None:
        """Enter a client's message, as it has travelled."""
        self._enter(message, "up", message.metadata.src_node_id, size)

    def plain(self, message: Message, direction: Direction) -> None:
        """Enter a message that nobody encodes."""
        records = message.content.array_records.values() if message.has_content() else ()
        tensors = sum(len(record) for record in records)
        raw = sum(map(raw_bytes, records))
        if message.has_content():
            raw += masked_bytes(message.content)
        enter = self.sent if direction == "down" else self.received
        if direction == "down":
            self.describe_layers(message, lambda: _plain_layers(records))
        enter(message, Size(tensors, raw, raw))

    def describe_layers(self, message: Message, layers: Callable[[], Iterable[LayerSize]]) -> None:
        """Note the sizes of the layers, once a run: with the first message that has arrays."""
        if self._described or not message.has_content() or not message.content.array_records:
            return
        self._described = True
        merged: dict[str, LayerSize] = {}
        for layer in layers():  # a message may carry the same names in several records
            known = merged.get(layer.layer)
            merged[layer.layer] = layer if known is None else _merged(known, layer)
        for layer in merged.values():
            self.ledger.describe(layer)

    def evaluated(self, reply: Message) -> None:
        """Take in how good a client found the model; others' replies are passed over."""
        kind = reply.metadata.message_type
        if kind.startswith("evaluate") and reply.has_content():
            legacy: Mapping[str, Any] = reply.content.config_records.get("evaluateres.metrics", {})
            self._evaluated.add(scalars([*reply.content.metric_records.values(), legacy]))

    def close_evaluation(self) -> None:
        """All replies of an evaluation are in: note their mean."""
        if means := self._evaluated.taken():
            self.ledger.log(self._round, means, source="clients")

    def _enter(self, message: Message, direction: Direction, node: int, size: Size) -> None:
        if not message.has_content() or not message.content.array_records:
            return
        self.ledger.record(
            LedgerEntry(
                round=self._round,
                kind=message.metadata.message_type,
                direction=direction,
                client=str(node),
                tensors=size.tensors,
                raw_bytes=size.raw,
                encoded_bytes=sum(map(array_bytes, message.content.array_records.values()))
                + masked_bytes(message.content),
                dense_bytes=size.dense,
            )
        )

    def log_round(self) -> None:
        """Say in one line what the current round has cost."""
        self.close_evaluation()
        if self.ledger.totals(round=self._round).messages:
            log.info("fedpara: %s", self.ledger.line(self._round))

    def log_run(self) -> None:
        """Say in one line what the run has cost, and the dense model would have."""
        self.log_round()
        if (line := self.ledger.run_line()) is not None:
            log.info("fedpara: %s", line)


def _plain_layers(records: Iterable[ArrayRecord]) -> Iterable[LayerSize]:
    for record in records:
        for name, array in record.items():
            size = value_bytes(array)
            layer = name.rpartition(".")[0]
            yield LayerSize(layer=layer, tensors=1, raw_bytes=size, dense_bytes=size)


def _merged(a: LayerSize, b: LayerSize) -> LayerSize:
    return replace(
        a,
        tensors=a.tensors + b.tensors,
        raw_bytes=a.raw_bytes + b.raw_bytes,
        dense_bytes=a.dense_bytes + b.dense_bytes,
    )


def _round_of(message: Message) -> int | None:
    """Strategies write the round into a config record; the legacy ones into the group."""
    for record in message.content.config_records.values():
        if "server-round" in record:
            return int(str(record["server-round"]))
    group = message.metadata.group_id
    return int(group) if group and group.isdecimal() else None
