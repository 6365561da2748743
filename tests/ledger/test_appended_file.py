"""A ledger's file: cells that are text, sums alone in memory, and a disk that refuses."""

from __future__ import annotations

import csv
import errno
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from fedpara_plugins import ConfigError
from fedpara_plugins.ledger import Ledger, LedgerEntry
from fedpara_plugins.support import Outages

STARTS = ["=", "+", "-", "@", "\t", "\n", "\r", "=cmd|' /C calc'!A0", '"=']
ENTRY = LedgerEntry(
    round=1, kind="train", direction="up", client="7", tensors=3, raw_bytes=4, encoded_bytes=5
)


def entry(**changes):
    return replace(ENTRY, **changes)


# Cells of a spreadsheet


@pytest.mark.parametrize(
    "start", ["=", "+", "-", "@", "\t", "\n", "\r", "=cmd|' /C calc'!A0", '"=']
)
def test_no_text_cell_is_a_formula_and_every_text_is_read_back(tmp_path, start):
    path = tmp_path / "run.csv"
    client = f"{start}1+1"
    ledger = Ledger(path)
    ledger.record(entry(client=client, kind=client))
    ledger.log(1, {client: -0.5}, source=client)
    with path.open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert [cell for cell in cells if cell[:1] in ("=", "+", "@", "\t", "\n", "\r")] == []
    assert [cell for cell in cells if cell[:1] == "-"] == ["-0.5"]  # a number stays one
    (message,) = ledger.entries
    (metric,) = ledger.evaluations
    assert {message.client, message.kind, metric.source, metric.metric} == {client}


# Memory


@pytest.mark.parametrize("name", ["run.jsonl", "run.csv", None])
def test_a_ledger_keeps_sums_and_not_its_messages(tmp_path, name):
    """1,000 rounds of 10,000 clients may take 100 MB: here 40 rounds of 500, in proportion."""
    ledger = Ledger(tmp_path / name if name else None, sums_only=True)

    def rounds(first, last):
        for number in range(first, last):
            for client in range(500):
                for direction in ("down", "up"):
                    ledger.record(
                        entry(round=number, direction=direction, client=f"client {number} {client}")
                    )

    tracemalloc.start()
    rounds(0, 10)
    before, _ = tracemalloc.get_traced_memory()
    rounds(10, 40)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Of 1,000 messages in a round, each would take more than 200 bytes, and its name more than 50.
    assert (after - before) / 30 < 3000
    assert ledger.totals().messages == 40_000
    assert ", 500 clients" in ledger.line(2)
    assert ", 500 clients" in ledger.line(39)
    assert len(ledger.entries) == (40_000 if name else 0)


# A disk that refuses


class FullDisk:
    """Takes a number of bytes, and then no more."""

    def __init__(self, monkeypatch, room):
        self.room = room
        plain = Path.open
        disk = self

        def opened(path, mode="r", *args, **kwargs):
            file = plain(path, mode, *args, **kwargs)
            return Limited(file, disk) if "a" in mode else file

        monkeypatch.setattr(Path, "open", opened)


class Limited:
    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def tell(self):
        return self.file.tell()

    def truncate(self, size):
        return self.file.truncate(size)

    def write(self, data):
        taken = min(len(data), self.disk.room)
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.disk.room -= taken
        return self.file.write(data[:taken])


@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_a_full_disk_costs_lines_and_neither_sums_nor_the_file(tmp_path, monkeypatch, caplog, name):
    path, outages = tmp_path / name, Outages()
    ledger = Ledger(path, outages=outages)
    ledger.record(entry(round=1))
    disk = FullDisk(monkeypatch, room=30)
    ledger.record(entry(round=2))
    assert path.read_bytes().endswith(b"\n")  # nothing is left of the half that was taken
    ledger.record(entry(round=3))
    assert [line.round for line in Ledger.read(path)] == [1]
    disk.room = 10**6
    ledger.record(entry(round=4))
    assert [line.round for line in Ledger.read(path)] == [1, 4]
    assert ledger.totals().messages == 4
    assert caplog.text.count("the ledger cannot be written") == 1
    assert f"the ledger at {path} (No space left on device)" in outages.last_line()


def test_without_outages_the_system_s_error_is_raised(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "run.jsonl")
    FullDisk(monkeypatch, room=0)
    with pytest.raises(OSError, match="No space left"):
        ledger.record(entry(round=1))


@pytest.mark.parametrize("odd", [lambda path: path.mkdir(), os.mkfifo])
def test_what_is_no_file_is_refused_at_the_start(tmp_path, odd):
    path = tmp_path / "run.jsonl"
    odd(path)
    with pytest.raises(ConfigError, match=str(path)):
        Ledger(path, outages=Outages())


def test_a_ledger_below_a_file_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be a file"):
        Ledger(tmp_path / "file" / "run.jsonl", outages=Outages())
