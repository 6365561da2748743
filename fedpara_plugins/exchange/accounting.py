"""The ledger of a run: an entry for each message, and log lines on what rounds cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from fedpara_plugins._version import __version__
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.exchange.sizes import Size, codec_text
from fedpara_plugins.ledger import Direction, LayerSize, Ledger, LedgerEntry, RunStart
from fedpara_plugins.support import Outages

__all__ = ["RunAccounting"]


class RunAccounting:
    """Enters messages into a ledger.

    Args:
        path: of the ledger's file; None for its sums alone.
        config: of the run, for the ledger's first line; None leaves that out.
        log: gets the lines about rounds and the run.
        outages: gets what cannot be written; None for one of its own.

    Attributes:
        ledger: of the run.
        outages: what could not be written.

    Raises:
        FedParaError: another kind of file is in the ledger's place.
    """

    def __init__(
        self,
        path: Path | None,
        config: FedParaConfig | None,
        log: logging.Logger,
        outages: Outages | None = None,
    ) -> None:
        self.outages = outages or Outages(log)
        self.ledger = Ledger(path, sums_only=True, outages=self.outages)
        self._log = log
        self._described = path is None
        if config is not None:
            self.ledger.describe(
                RunStart(version=__version__, method=config.method, codec=codec_text(config))
            )

    def message(
        self,
        server_round: int,
        direction: Direction,
        client: str,
        size: Size,
        *,
        encoded: int,
        kind: str = "train",
    ) -> None:
        """Enter a message.

        Args:
            server_round: that it belongs to.
            direction: of the message.
            client: who sends or receives it.
            size: before coding.
            encoded: bytes that travel.
            kind: what it is for.
        """
        self.ledger.record(
            LedgerEntry(
                round=server_round,
                kind=kind,
                direction=direction,
                client=client,
                tensors=size.tensors,
                raw_bytes=size.raw,
                encoded_bytes=encoded,
                dense_bytes=size.dense,
            )
        )

    def describe_layers(self, layers: Callable[[], Iterable[LayerSize]]) -> None:
        """Note the sizes of the layers, once per run; layers of one name are added up."""
        if self._described:
            return
        self._described = True
        merged: dict[str, LayerSize] = {}
        for layer in layers():  # a message may carry the same names in several records
            known = merged.get(layer.layer)
            merged[layer.layer] = layer if known is None else _sum(known, layer)
        for layer in merged.values():
            self.ledger.describe(layer)

    def log_round(self, server_round: int) -> None:
        """Log in one line what a round has cost."""
        if self.ledger.totals(round=server_round).messages:
            self._log.info("fedpara: %s", self.ledger.line(server_round))

    def log_run(self) -> None:
        """Log in one line what the run has cost, and what the dense model would have."""
        if (line := self.ledger.run_line()) is not None:
            self._log.info("fedpara: %s", line)


def _sum(a: LayerSize, b: LayerSize) -> LayerSize:
    return replace(
        a,
        tensors=a.tensors + b.tensors,
        raw_bytes=a.raw_bytes + b.raw_bytes,
        dense_bytes=a.dense_bytes + b.dense_bytes,
    )
