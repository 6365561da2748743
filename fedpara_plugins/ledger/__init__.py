"""What was sent: bytes and tensors of every message, by round, direction and client.

Sizes are bytes as measured on the encoded messages; MB = 10^6 bytes. Next to the messages stand
what the run was set to, the sizes of the layers, and how good the model was after each round.
"""

from __future__ import annotations

from fedpara_plugins.ledger.book import Ledger, LedgerTotals, Sum
from fedpara_plugins.ledger.files import CSV_HEAD, read_lines, torn_bytes
from fedpara_plugins.ledger.records import (
    Direction,
    Evaluation,
    LayerSize,
    LedgerEntry,
    Line,
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
    "LedgerTotals",
    "Line",
    "RunStart",
    "Sum",
    "layer_sizes",
    "read_lines",
    "torn_bytes",
]
