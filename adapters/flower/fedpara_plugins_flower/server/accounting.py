"""Flower's messages in the run's ledger."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message

from fedpara_plugins import FedParaConfig, Ledger
from fedpara_plugins.exchange import RunAccounting, Size
from fedpara_plugins.ledger import Direction, LayerSize
from fedpara_plugins.support import Outages
from fedpara_plugins_flower.messages.records import array_bytes, raw_bytes, value_bytes
from fedpara_plugins_flower.privacy.secagg import masked_bytes
from fedpara_plugins_flower.seams import EVALUATE_METRICS, round_of
from fedpara_plugins_flower.server.evaluation import ClientMetrics, scalars

__all__ = ["Accounting"]

log = logging.getLogger("flwr.fedpara")


class Accounting:
    """Enters Flower's messages into the run's ledger.

    Bytes are those of the arrays as Flower serialises them (the payload, or NumPy arrays with their
    headers); names, metrics and the transport's own framing are not counted.

    Args:
        path: of the ledger's file; None for its sums alone.
        config: of the run, for the ledger's first line; None leaves that out.
        outages: gets what cannot be written; None logs it alone.
    """

    def __init__(
        self,
        path: Path | None,
        config: FedParaConfig | None = None,
        outages: Outages | None = None,
    ) -> None:
        self._run = RunAccounting(path, config, log, outages)
        self._round = 0
        self._evaluated = ClientMetrics()

    @property
    def ledger(self) -> Ledger:
        """The run's ledger."""
        return self._run.ledger

    def sent(self, message: Message, size: Size) -> None:
        """Enter a message to a client, as it travels; a new round logs the one before."""
        found = round_of(message)
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
        if message.has_content() and message.content.array_records:
            self._run.describe_layers(layers)

    def evaluated(self, reply: Message) -> None:
        """Take in how good a client found the model; replies to other messages are passed over."""
        kind = reply.metadata.message_type
        if kind.startswith("evaluate") and reply.has_content():
            legacy: Mapping[str, Any] = reply.content.config_records.get(EVALUATE_METRICS, {})
            self._evaluated.add(scalars([*reply.content.metric_records.values(), legacy]))

    def close_evaluation(self) -> None:
        """Note the mean over all replies of an evaluation."""
        if means := self._evaluated.taken():
            self.ledger.log(self._round, means, source="clients")

    def _enter(self, message: Message, direction: Direction, node: int, size: Size) -> None:
        if not message.has_content() or not message.content.array_records:
            return
        encoded = sum(map(array_bytes, message.content.array_records.values()))
        self._run.message(
            self._round,
            direction,
            str(node),
            size,
            encoded=encoded + masked_bytes(message.content),
            kind=message.metadata.message_type,
        )

    def log_round(self) -> None:
        """Log in one line what the current round has cost."""
        self.close_evaluation()
        self._run.log_round(self._round)

    def log_run(self) -> None:
        """Log in one line what the run has cost, and what the dense model would have."""
        self.log_round()
        self._run.log_run()


def _plain_layers(records: Iterable[ArrayRecord]) -> Iterable[LayerSize]:
    for record in records:
        for name, array in record.items():
            size = value_bytes(array)
            layer = name.rpartition(".")[0]
            yield LayerSize(layer=layer, tensors=1, raw_bytes=size, dense_bytes=size)
