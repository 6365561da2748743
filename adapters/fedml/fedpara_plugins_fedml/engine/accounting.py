"""Counts every message as it was encoded, and says what a round cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from fedpara_plugins import FedParaConfig, Ledger, LedgerEntry, __version__
from fedpara_plugins.exchange import Size, codec_text
from fedpara_plugins.ledger import Direction, LayerSize, RunStart

__all__ = ["Accounting"]

log = logging.getLogger("fedpara.fedml")


class Accounting:
    """The run's ledger.

    Args:
        path: of the ledger's file, or None to keep it in memory.
        config: of the run, for the ledger's first line.
    """

    def __init__(self, path: Path | None, config: FedParaConfig) -> None:
        self.ledger = Ledger(path)
        self._described = path is None
        self.ledger.describe(
            RunStart(version=__version__, method=config.method, codec=codec_text(config))
        )

    def message(
        self,
        server_round: int,
        direction: Direction,
        client: str,
        data: bytes,
        size: Size,
        *,
        kind: str = "train",
    ) -> None:
        """Enter a message, all of its bytes."""
        self.ledger.record(
            LedgerEntry(
                round=server_round,
                kind=kind,
                direction=direction,
                client=client,
                tensors=size.tensors,
                raw_bytes=size.raw,
                encoded_bytes=len(data),
                dense_bytes=size.dense,
            )
        )

    def describe_layers(self, layers: Callable[[], Iterable[LayerSize]]) -> None:
        """Note the sizes of the layers, once a run."""
        if not self._described:
            self._described = True
            for layer in layers():
                self.ledger.describe(layer)

    def log_round(self, server_round: int) -> None:
        """Say in one line what the round has cost."""
        if self.ledger.totals(round=server_round).messages:
            log.info("fedpara: %s", self.ledger.line(server_round))

    def log_run(self) -> None:
        """Say in one line what the run has cost, and the dense model would have."""
        if (line := self.ledger.run_line()) is not None:
            log.info("fedpara: %s", line)
