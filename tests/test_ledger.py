"""The ledger: what was sent, kept while running."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest

from fedpara_plugins.errors import FedParaError
from fedpara_plugins.ledger import Ledger, LedgerEntry

ENTRY = LedgerEntry(
    round=3,
    kind="train",
    direction="up",
    client="7",
    tensors=33,
    raw_bytes=6_000_000,
    encoded_bytes=1_280_000,
    dense_bytes=61_000_000,
)


def test_totals_by_direction_and_round():
    ledger = Ledger()
    ledger.record(ENTRY)
    ledger.record(replace(ENTRY, client="8", encoded_bytes=20))
    ledger.record(replace(ENTRY, direction="down", encoded_bytes=300))
    ledger.record(replace(ENTRY, round=4, encoded_bytes=4000))
    assert ledger.totals() == (4, 132, 24_000_000, 1_284_320, 244_000_000)
    assert ledger.totals("up").encoded_bytes == 1_284_020
    assert ledger.totals("down") == (1, 33, 6_000_000, 300, 61_000_000)
    assert ledger.totals(round=3).encoded_bytes == 1_280_320
    assert ledger.totals("up", 4).encoded_bytes == 4000
    assert ledger.totals("down", 4) == (0, 0, 0, 0, 0)


def test_one_line_a_round():
    ledger = Ledger()
    ledger.record(ENTRY)
    ledger.record(replace(ENTRY, direction="down", encoded_bytes=12_345, dense_bytes=100_000))
    ledger.record(replace(ENTRY, client="8", direction="down", encoded_bytes=0, dense_bytes=0))
    assert ledger.line(3) == (
        "round 3: up 1.28 MB of 61.0 MB dense (47.7x fewer), "
        "down 12.3 kB of 0.10 MB dense (8.1x fewer), 2 clients"
    )
    assert ledger.line(9) == "round 9: up 0.00 kB, down 0.00 kB, 0 clients"


def test_entries_are_on_disk_before_record_returns(tmp_path):
    path = tmp_path / "runs" / "ledger.jsonl"
    ledger = Ledger(path)
    for number in range(3):
        ledger.record(replace(ENTRY, round=number))
        assert tuple(Ledger.read(path)) == ledger.entries
    assert len(path.read_text().splitlines()) == 3


def test_a_torn_last_line_is_ignored_and_said(tmp_path, caplog):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record(ENTRY)
    whole = path.read_bytes()
    for length in range(1, len(whole)):
        path.write_bytes(whole + whole[:length])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert Ledger.read(path) == [ENTRY]
        assert "torn" in caplog.text
    path.write_bytes(whole)
    caplog.clear()
    assert Ledger.read(path) == [ENTRY]
    assert not caplog.records


def test_a_file_is_continued_after_a_kill(tmp_path, caplog):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record(ENTRY)
    path.write_bytes(path.read_bytes() + b'{"round":4,"ki')
    continued = Ledger(path)
    assert "cut off a torn last line of 14 bytes" in caplog.text
    continued.record(replace(ENTRY, round=5))
    assert [entry.round for entry in Ledger.read(path)] == [3, 5]
    assert [entry.round for entry in continued.entries] == [5]
    Ledger(path).record(replace(ENTRY, round=6))
    assert [entry.round for entry in Ledger.read(path)] == [3, 5, 6]


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "nothing",
        "{}",
        '{"round":1}',
        '{"round":"1","kind":"train","direction":"up","client":"7","tensors":1,"raw_bytes":1,'
        '"encoded_bytes":1,"dense_bytes":1}',
        '{"round":1,"kind":"train","direction":"left","client":"7","tensors":1,"raw_bytes":1,'
        '"encoded_bytes":1,"dense_bytes":1}',
    ],
)
def test_another_bad_line_is_named(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record(ENTRY)
    path.write_text(path.read_text() + line + "\n" + path.read_text())
    with pytest.raises(FedParaError, match="line 2: expected a ledger entry with round, kind"):
        Ledger.read(path)


def test_threads_may_share_it(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)

    def work(client):
        for number in range(50):
            ledger.record(replace(ENTRY, round=number, client=client))

    threads = [threading.Thread(target=work, args=(str(client),)) for client in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.totals().messages == 400
    assert tuple(Ledger.read(path)) == ledger.entries


def test_wrong_types_are_refused_when_recorded():
    with pytest.raises(TypeError, match=r"tensors: expected int, got 1\.5"):
        replace(ENTRY, tensors=1.5)
    with pytest.raises(ValueError, match="'up' or 'down', got 'out'"):
        replace(ENTRY, direction="out")
