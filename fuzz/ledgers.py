"""Ledgers that anyone may have written: read, summed up, and drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from fedpara_plugins import FedParaError
from fedpara_plugins.ledger import (
    CSV_HEAD,
    Direction,
    LayerSize,
    Ledger,
    LedgerEntry,
    RunStart,
)
from fedpara_plugins.ledger.page import read_runs, render_page
from fedpara_plugins.testing import check_refusal

__all__ = ["LedgerChecker", "is_ledger"]


def is_ledger(data: bytes) -> bool:
    """Tell whether a reader would take these bytes for a ledger."""
    return data[:1] == b"{" or data[:5] == CSV_HEAD[:5].encode()


class LedgerChecker:
    """Checks ledgers; files stand in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, data: bytes) -> bool:
        """Check bytes: if they are a ledger, draw it; return whether they are.

        Raises:
            AssertionError: the page holds what the ledger said as markup, or an error is unfit.
        """
        path = self.folder / "run.jsonl"
        path.write_bytes(data)
        try:
            page = render_page(read_runs([str(path)]))
        except FedParaError as error:
            check_refusal(error)
            return False
        page.encode()  # it must be writable as UTF-8
        if "<script" in page.lower() or "<img" in page.lower():
            raise AssertionError("the page holds an element that the ledger named")
        return True

    def seeds(self) -> Iterator[bytes]:
        """Yield a small ledger in both formats, with names and figures that are hard to draw."""
        for suffix in ("jsonl", "csv"):
            path = self.folder / f"seed.{suffix}"
            path.unlink(missing_ok=True)
            ledger = Ledger(path)
            ledger.describe(RunStart(version="1", method="fedpara", codec="small"))
            ledger.describe(LayerSize(layer="<img src=x>", tensors=3, raw_bytes=9, dense_bytes=70))
            for number in (1, 2):
                for direction in ("down", "up"):
                    ledger.record(_message(number, direction))
                ledger.log(number, accuracy=number / 4, loss=math.nan)
            yield path.read_bytes()


def _message(number: int, direction: Direction) -> LedgerEntry:
    return LedgerEntry(
        round=number,
        kind="train",
        direction=direction,
        client='"<script>',
        tensors=3,
        raw_bytes=9,
        encoded_bytes=2**40,
        dense_bytes=70,
    )
