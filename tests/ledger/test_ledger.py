"""The ledger: what was sent, kept while running."""

from __future__ import annotations

import csv
import logging
import re
import threading
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.codecs import encode_payload, parse_codec
from fedpara_plugins.errors import FedParaError
from fedpara_plugins.ledger import (
    CSV_HEAD,
    Evaluation,
    LayerSize,
    Ledger,
    LedgerEntry,
    RunStart,
    layer_sizes,
    read_lines,
    torn_bytes,
)

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
        "down 12.3 kB of 100 kB dense (8.1x fewer), 2 clients"
    )
    assert ledger.line(9) == "round 9: up 0 B, down 0 B, 0 clients"


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


# Both formats, and the other kinds of lines


OTHERS = [
    RunStart(version="0.1.0", method="fedpara", codec="up int8, down none"),
    LayerSize(layer="conv1", tensors=5, raw_bytes=400, dense_bytes=4000),
    LayerSize(layer="", tensors=1, raw_bytes=4),
    Evaluation(round=0, source="server", metric="accuracy", value=0.1),
    Evaluation(round=1, source="clients", metric="loss", value=1e-30),
    Evaluation(round=1, source="clients", metric="loss", value=None),
]
NAMES = ['a,"b"', "two\nlines\r\n", "\\n", "\x00\x1b", "日\u2028", "\udc80", "", " x ", "=1+1", "'"]


def write(path, lines):
    ledger = Ledger(path)
    for line in lines:
        if isinstance(line, LedgerEntry):
            ledger.record(line)
        elif isinstance(line, Evaluation):
            value = float("nan") if line.value is None else line.value
            ledger.log(line.round, {line.metric: value}, source=line.source)
        else:
            ledger.describe(line)
    return ledger


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / f"ledger.{suffix}"
    lines = [*OTHERS, ENTRY, *(replace(ENTRY, client=name, kind=name) for name in NAMES)]
    ledger = write(path, lines)
    assert list(read_lines(path)) == lines
    assert Ledger.read(path) == list(ledger.entries) == lines[len(OTHERS) :]
    assert ledger.evaluations == tuple(OTHERS[3:])
    head = suffix == "csv"
    assert path.read_bytes().count(b"\n") == len(path.read_text().splitlines()) == len(lines) + head


def test_csv_is_what_a_csv_reader_reads(tmp_path):
    path = tmp_path / "ledger.csv"
    write(path, [ENTRY, OTHERS[3]])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {key: value for key, value in rows[0].items() if value} == {
        "line": "message",
        **{key: str(value) for key, value in asdict(ENTRY).items()},
    }
    assert (rows[1]["line"], rows[1]["metric"], rows[1]["value"]) == (
        "evaluation",
        "accuracy",
        "0.1",
    )
    assert rows[1]["encoded_bytes"] == ""


FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(1)",
    "  =1",
    "a;=1",
    "a; ;  -1",
    "=;=;=",
    "\t=1",
    "\n=1",
    "\r=1",
]


@pytest.mark.parametrize("name", FORMULAS)
def test_no_spreadsheet_computes_a_cell(tmp_path, name):
    """Whether it takes commas or semicolons for the ends of cells."""
    path = tmp_path / "ledger.csv"
    line = replace(ENTRY, client=name)
    write(path, [line])
    text = path.read_text().splitlines()[1]
    for mark in (",", ";"):
        for cell in next(csv.reader([text], delimiter=mark)):
            assert not cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\n", "\r"))
    assert list(read_lines(path)) == [line]


def test_messages_are_written_as_by_the_first_version(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record(ENTRY)
    assert path.read_text() == (
        '{"round":3,"kind":"train","direction":"up","client":"7","tensors":33,'
        '"raw_bytes":6000000,"encoded_bytes":1280000,"dense_bytes":61000000}\n'
    )


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_file_may_be_cut_at_any_byte(tmp_path, suffix):
    """What a killed run leaves: all whole lines, and it can be continued."""
    path = tmp_path / f"ledger.{suffix}"
    write(path, [*OTHERS[:2], replace(ENTRY, client="two\nlines"), ENTRY])
    data = path.read_bytes()
    heads = 1 if suffix == "csv" else 0
    for length in range(1, len(data) + 1):
        path.write_bytes(data[:length])
        whole = data[:length].count(b"\n")
        if whole:
            assert len(list(read_lines(path))) == whole - heads
        else:
            with pytest.raises(FedParaError, match="no whole line"):
                list(read_lines(path))
        assert torn_bytes(path) == length - (data[:length].rfind(b"\n") + 1)
        Ledger(path).record(ENTRY)
        assert Ledger.read(path)[-1] == ENTRY
        assert path.read_bytes().startswith(data[:length].rpartition(b"\n")[0])


def test_a_torn_line_longer_than_what_is_read_at_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).record(ENTRY)
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * 200_000)
    assert torn_bytes(path) == 200_000
    Ledger(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("first", "second"), [("jsonl", "csv"), ("csv", "jsonl")])
def test_a_file_of_the_other_format_is_not_continued(tmp_path, first, second):
    Ledger(tmp_path / f"a.{first}").record(ENTRY)
    (tmp_path / f"a.{first}").rename(tmp_path / f"a.{second}")
    with pytest.raises(FedParaError, match=rf"a\.{second}: cannot continue it as"):
        Ledger(tmp_path / f"a.{second}")
    assert Ledger.read(tmp_path / f"a.{second}") == [ENTRY]  # the suffix is not asked


CSV_LINE = "message,3,train,up,7,33,600,128,6100" + "," * (CSV_HEAD.count(",") - 8)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("message,3", "2 of"),
        (CSV_LINE.replace("128", "1.5"), r"encoded_bytes: expected a whole number, got '1\.5'"),
        (CSV_LINE.replace("128", ""), "encoded_bytes: expected a whole number, got ''"),
        (CSV_LINE.replace("128", "\u0661"), "codec can't decode"),
        (CSV_LINE.replace("128", "-128"), "encoded_bytes: expected a number from 0"),
        (CSV_LINE.replace("128", "9" * 19), "encoded_bytes: expected a number from 0"),
        (CSV_LINE.replace("message", "massage"), "unknown kind 'massage'"),
        (CSV_LINE.replace("7", "\\x"), "Invalid"),
        (CSV_LINE.replace("7", '"7'), "unexpected end of data"),
        (CSV_LINE + "x", "unexpected value in column"),
        ("", "0 of"),
    ],
)
def test_a_bad_csv_line_is_named(tmp_path, line, reason):
    path = tmp_path / "ledger.csv"
    path.write_text(f"{CSV_HEAD}\n{CSV_LINE}\n{line}\n{CSV_LINE}\n", encoding="utf-8")
    with pytest.raises(FedParaError, match=r"ledger\.csv, line 3: expected a ledger") as caught:
        Ledger.read(path)
    assert re.search(reason, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no whole line"),
        (b'{"round":1', "holds no whole line"),
        (b"line,other\n", "line 1: expected the columns line,round"),
        (b"\x00\xff\x89PNG\n", "line 1: expected a ledger entry"),
        (b"[" * 100_000 + b"\n", "line 1: expected a ledger entry"),
        (b'{"line":"dance"}\n', "unknown kind 'dance'; was it written by a newer version"),
        (b'{"line":["evaluation"]}\n', "line 1: expected a ledger entry"),
        (
            b'{"line":"evaluation","round":1,"source":"s","metric":"m"}\n',
            "line 1: expected a ledger line of kind 'evaluation' with round, source, metric, value",
        ),
        (
            b'{"line":"evaluation","round":1,"source":"s","metric":"m","value":"9"}\n',
            "value: expected a number or null, got '9'",
        ),
        (
            b'{"line":"evaluation","round":1,"source":"s","metric":"m","value":true}\n',
            "value: expected a number or null, got True",
        ),
        (
            b'{"line":"layer","layer":7,"tensors":1,"raw_bytes":1}\n',
            "layer: expected text, got 7",
        ),
        (b'{"line":"run","version":"1","method":"x","codec":"y","z":1}\n', "unexpected keyword"),
    ],
)
def test_files_that_are_none(tmp_path, content, reason):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(content)
    with pytest.raises(FedParaError, match=r"ledger\.jsonl") as caught:
        list(read_lines(path))
    assert reason in str(caught.value)


def test_numbers_out_of_range_are_refused():
    for name in ("round", "tensors", "raw_bytes", "encoded_bytes", "dense_bytes"):
        for number in (-1, 2**63, 10**400):
            with pytest.raises(ValueError, match=f"{name}: expected a number from 0"):
                replace(ENTRY, **{name: number})


def test_a_figure_that_is_no_number_is_none(tmp_path):
    path = tmp_path / "ledger.jsonl"
    head = '{"line":"evaluation","round":1,"source":"s","metric":"m","value":'
    for text, value in [("1" + "0" * 400, None), ("NaN", None), ("1e999", None), ("7", 7.0)]:
        path.write_text(head + text + "}\n")
        assert [line.value for line in read_lines(path)] == [value]


def test_a_ratio_is_given_only_where_the_dense_size_is_known():
    ledger = Ledger()
    ledger.record(ENTRY)
    ledger.record(replace(ENTRY, client="8", dense_bytes=0))
    assert ledger.line(3) == "round 3: up 2.56 MB, down 0 B, 2 clients"


# Against what was really sent


def test_it_reconciles_with_payloads_and_the_papers_formula(tmp_path):
    """A federated loop of its own; bytes counted by hand, and by 2 x participants x size x rounds.

    One matrix (48 x 64) by FedPara, with factors X1, X2 (48 x R) and Y1, Y2 (64 x R), and a bias.
    """
    torch.manual_seed(0)
    participants, rounds = 3, 4
    model = fedpara.convert(nn.Sequential(nn.Linear(64, 48)), method="fedpara", gamma=0.3)
    spec, shared = fedpara.ModelSpec.of(model), fedpara.split(model).shared
    ledger = Ledger(tmp_path / "ledger.csv")
    sent = {"up": 0, "down": 0}
    for number in range(1, rounds + 1):
        for client in range(participants):
            for direction in ("down", "up"):
                codec = parse_codec("none" if direction == "down" else "lossless")
                payload = encode_payload(shared, codec=codec, model=spec.to_json())
                sent[direction] += len(payload)
                ledger.record(
                    LedgerEntry(
                        round=number,
                        kind="train",
                        direction=direction,
                        client=str(client),
                        tensors=len(shared),
                        raw_bytes=sum(t.numel() * t.element_size() for t in shared.values()),
                        encoded_bytes=len(payload),
                        dense_bytes=spec.dense_bytes(shared),
                    )
                )
    rank = model[0].plans["weight"].rank
    size = 4 * (2 * rank * (48 + 64) + 48)
    dense = 4 * (48 * 64 + 48)
    total = ledger.totals()
    assert total.raw_bytes == 2 * participants * size * rounds
    assert total.dense_bytes == 2 * participants * dense * rounds
    assert total.encoded_bytes == sent["up"] + sent["down"]
    read = Ledger.read(tmp_path / "ledger.csv")
    for direction in ("up", "down"):
        assert ledger.totals(direction).encoded_bytes == sent[direction]
        assert sum(e.encoded_bytes for e in read if e.direction == direction) == sent[direction]
    layers = layer_sizes(shared, spec)
    assert [(x.layer, x.tensors, x.raw_bytes, x.dense_bytes) for x in layers] == [
        ("0", 5, size, dense)
    ]
