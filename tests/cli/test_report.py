"""``fedpara report`` writes one page, or nothing and one line."""

import contextlib
import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from fedpara_plugins import FedParaError, Ledger, LedgerEntry
from fedpara_plugins.cli.inspect_file import inspect_file
from fedpara_plugins.ledger import LayerSize, RunStart
from fedpara_plugins.ledger.page import read_runs, runs


def ledger(path, **changes):
    values = {"round": 1, "kind": "train", "direction": "up", "client": "7", "tensors": 4,
              "raw_bytes": 4000, "encoded_bytes": 1000, "dense_bytes": 20000}  # fmt: skip
    Ledger(path).record(LedgerEntry(**{**values, **changes}))
    return path


def test_several_runs_on_one_page(command):
    ledger("a.jsonl")
    ledger("b.csv", encoded_bytes=2000)
    code, out, err = command("report", "a.jsonl", "dense=b.csv", "-o", "report.html")
    assert (code, err) == (0, "")
    page = Path("report.html").read_text(encoding="utf-8")
    assert out.startswith("report.html: a, dense; ")
    assert page.startswith("<!doctype html>")
    assert page.count("20.0x fewer") == page.count("10.0x fewer") == 1


def test_a_missing_file(refused):
    assert "no.jsonl: No such file" in refused("report", "no.jsonl", "-o", "report.html")
    ledger("a.jsonl")
    refused("report", "a.jsonl", "no.jsonl", "-o", "report.html")
    assert not Path("report.html").exists()
    assert "expected a file, this is a folder" in refused("report", ".", "-o", "report.html")
    assert "no/report.html: No such file" in refused("report", "a.jsonl", "-o", "no/report.html")


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b'{"round":1'])
def test_a_file_without_a_line(refused, content):
    Path("run.jsonl").write_bytes(content)
    line = refused("report", "run.jsonl", "-o", "report.html", code=1)
    assert "run.jsonl: holds no whole line" in line


def test_a_bad_line_is_named_and_the_earlier_page_stays(refused):
    ledger("run.jsonl")
    with Path("run.jsonl").open("ab") as file:
        file.write(b"\x1b]0;garbage\x07\n")
    Path("report.html").write_text("before")
    line = refused("report", "run.jsonl", "-o", "report.html", code=1)
    assert "run.jsonl, line 2: expected a ledger entry" in line
    assert "\x1b" not in line
    assert Path("report.html").read_text() == "before"


def test_a_ledger_is_not_written_over(refused):
    ledger("run.jsonl")
    before = Path("run.jsonl").read_bytes()
    line = refused("report", "run.jsonl", "-o", "./run.jsonl")
    assert "is one of the ledgers" in line
    assert Path("run.jsonl").read_bytes() == before


def test_words_that_are_no_run(refused):
    assert "name=path; got '=x'" in refused("report", "=x", "-o", "r.html")
    assert "name=path; got 'x='" in refused("report", "x=", "-o", "r.html")
    assert "--output" in refused("report", "x")


def test_inspect_reads_both_formats(command):
    for name in ("a.jsonl", "a.csv"):
        ledger(name)
        code, out, _ = command("inspect", name)
        assert code == 0
        assert f"{name}: ledger of 1 messages, 1 rounds, 1 clients" in out


@pytest.mark.parametrize("command_word", ["report", "inspect"])
@pytest.mark.parametrize("kind", ["named pipe", "socket", "device", "folder"])
def test_what_is_no_regular_file_is_refused_unopened(refused, command_word, kind):
    """A named pipe has no end as long as nobody writes, and a device may have none at all."""
    path = Path("odd")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        if kind == "named pipe":
            os.mkfifo(path)
        elif kind == "socket":
            server.bind(str(path))
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        more = ("-o", "report.html") if command_word == "report" else ()
        assert f"odd: expected a file, this is a {kind}" in refused(command_word, "odd", *more)


@pytest.mark.parametrize("start", [b"", b'{"a":"', b'{"round":1}\n'])
@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_a_line_without_end_is_not_read(refused, start, ending):
    Path("run.jsonl").write_bytes(start + b"x" * 2**22 + ending)
    tracemalloc.start()
    try:
        with pytest.raises(FedParaError, match=r"run.jsonl, line \d: expected"):
            read_runs(["run.jsonl"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**21
    refused("report", "run.jsonl", "-o", "report.html", code=1)


@pytest.mark.parametrize("changed", ["client", "round", "layer", "metric", "start"])
def test_a_ledger_of_ever_new_names_is_given_up(monkeypatch, tmp_path, changed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "MOST_KEPT", 20_000)
    path = ledger("run.jsonl")
    book = Ledger(path)
    for number in range(60):
        if changed in ("client", "round"):
            ledger(path, **{changed: number if changed == "round" else str(number)})
        elif changed == "layer":
            book.describe(LayerSize(layer=str(number), tensors=1, raw_bytes=4))
        elif changed == "metric":
            book.log(number, loss=0.5)
        else:
            book.describe(RunStart(version="1", method="none", codec="none"))
    with pytest.raises(FedParaError, match=r"run.jsonl: names more rounds"):
        read_runs([path])
    monkeypatch.setattr(runs, "MOST_KEPT", 40_000)
    assert read_runs([path])


def test_inspect_sums_a_ledger_up_without_keeping_its_messages(command):
    line = Path(ledger("run.jsonl")).read_bytes()
    Path("run.jsonl").write_bytes(line * 20_000)
    tracemalloc.start()
    try:
        text = inspect_file("run.jsonl")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "ledger of 20,000 messages, 1 rounds, 1 clients" in text
    assert "20,000,000" in text
    assert peak < 10**6
