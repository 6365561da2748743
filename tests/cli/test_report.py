"""``fedpara report`` writes one page, or nothing and one line."""

from pathlib import Path

import pytest

from fedpara_plugins import Ledger, LedgerEntry


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
