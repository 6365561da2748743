"""The ledger of a run: bytes and tensors of every message, by round, direction and client.

Sizes are bytes, measured on the encoded messages; MB = 10^6 bytes. Beside the messages, a ledger
holds the run's settings, the sizes of the layers, and the model's metrics after each round.
``page`` plots the ledgers of several runs. May import ``support``, ``text`` and ``errors``. Offers
the ledger, the kinds of lines that it holds, and readers of its files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpara_plugins._moved import serve_old_names
from fedpara_plugins.ledger.book import Ledger, LedgerTotals, RunningTotals
from fedpara_plugins.ledger.files import CSV_HEAD, read_lines, torn_bytes
from fedpara_plugins.ledger.records import (
    Direction,
    Evaluation,
    LayerSize,
    LedgerEntry,
    LedgerLine,
    RunStart,
)
from fedpara_plugins.ledger.sizes import layer_sizes

__all__ = [
    "CSV_HEAD",
    "Direction",
    "Evaluation",
    "LayerSize",
    "Ledger",
    "LedgerEntry",
    "LedgerLine",
    "LedgerTotals",
    "RunStart",
    "RunningTotals",
    "layer_sizes",
    "read_lines",
    "torn_bytes",
]

if not TYPE_CHECKING:
    __getattr__ = serve_old_names(__name__, {"Line": "LedgerLine", "Sum": "RunningTotals"})
