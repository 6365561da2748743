"""A disk that is full or read-only: what cannot be written is told, and goes on in memory."""

from __future__ import annotations

import errno
import logging
import sqlite3
import subprocess
import sys

import pytest

from fedpara_plugins.support import BackedStorage, Database, FileStorage, MemoryStorage, Outages
from fedpara_plugins.support import database as database_module
from fedpara_plugins.support import storage as storage_module

TABLES = "CREATE TABLE IF NOT EXISTS t (k TEXT PRIMARY KEY, v BLOB);"


def fill(connection):
    """Give the database no page more than it has: SQLite's own error for a full disk."""
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")


def put(key, size):
    return lambda connection: connection.execute(
        "INSERT OR REPLACE INTO t VALUES (?, ?)", (key, bytes(size))
    )


def keys(database):
    return [row[0] for row in database.rows("SELECT k FROM t ORDER BY k")]


def test_a_table_goes_on_in_memory_with_all_that_it_had(tmp_path, caplog):
    outages = Outages()
    database = Database(tmp_path / "t.sqlite", TABLES, what="the table", outages=outages)
    database.change(put("before", 10))
    fill(database._connection)
    database.change(put("refused", 100_000))
    database.change(put("after", 10))
    assert keys(database) == ["after", "before", "refused"]
    assert caplog.text.count("the table cannot be written") == 1
    assert f"the table at {tmp_path / 't.sqlite'} (database or disk is full)" in outages.last_line()
    assert keys(Database(tmp_path / "t.sqlite", TABLES)) == ["before"]


def test_an_error_that_is_not_the_disk_s_is_raised_and_changes_nothing(tmp_path):
    database = Database(tmp_path / "t.sqlite", TABLES)

    def change(connection):
        put("half", 10)(connection)
        connection.execute("INSERT INTO missing VALUES (1)")

    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        database.change(change)
    assert keys(database) == []


def test_a_clients_state_goes_on_in_memory_until_the_disk_takes_it(tmp_path, caplog):
    path, kept, outages = tmp_path / "a.sqlite", {}, Outages()

    def opened():
        return BackedStorage(path, MemoryStorage(kept), outages)

    storage = opened()
    storage["private"], storage["steps"] = b"old", b"1"
    storage.commit()
    assert kept == {}
    fill(storage._file._database)
    storage["private"] = b"new" * 100_000
    del storage["steps"]
    storage.commit()
    storage.close()
    assert dict(FileStorage(path)) == {"private": b"old", "steps": b"1"}
    again = opened()
    assert dict(again) == {"private": b"new" * 100_000}
    fill(again._file._database)
    again["residual"] = b"x" * 100_000
    assert sorted(again) == ["private", "residual"]
    again.commit()
    again.close()
    assert caplog.text.count("a client's state cannot be written") == 1
    last = opened()
    last["steps"] = b"3"
    last.commit()
    last.close()
    assert kept == {}
    assert sorted(FileStorage(path)) == ["private", "residual", "steps"]


def test_changes_that_are_not_committed_do_not_outlive_the_round(tmp_path):
    path, kept = tmp_path / "a.sqlite", {}
    storage = BackedStorage(path, MemoryStorage(kept), Outages())
    storage["private"] = b"x"
    storage.close()
    assert dict(BackedStorage(path, MemoryStorage(kept), Outages())) == {}


def test_a_file_that_cannot_be_made_leaves_memory(tmp_path, monkeypatch, caplog):
    def refused(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(storage_module, "make_private_folder", refused)
    kept = {}
    for _ in range(2):
        storage = BackedStorage(tmp_path / "new" / "a.sqlite", MemoryStorage(kept), Outages())
        storage["private"] = storage.get("private", b"") + b"x"
        storage.commit()
        storage.close()
    assert kept == {"held/private": b"xx"}
    assert "Read-only file system" in caplog.text


def test_what_a_read_only_disk_holds_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.sqlite"
    storage = FileStorage(path)
    storage["private"] = b"old"
    storage.commit()
    storage.close()

    def refused(path, tables):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(database_module, "_opened", refused)
    kept = {}
    storage = BackedStorage(path, MemoryStorage(kept), Outages())
    assert dict(storage) == {"private": b"old"}
    storage["private"] = b"new"
    storage.commit()
    assert storage["private"] == b"new"
    assert FileStorage(path)["private"] == b"old"


def test_each_thing_is_told_once_and_all_at_the_end(caplog):
    outages = Outages(logging.getLogger("fedpara"))
    assert outages.last_line() is None
    outages.log_last_line()
    for number in range(3):
        error = OSError(errno.ENOSPC, "No space left on device")
        outages.note("the ledger", f"run-{number % 2}.jsonl", error, "training goes on")
    outages.log_last_line()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[-1].endswith(
        "the ledger at run-0.jsonl (No space left on device); "
        "the ledger at run-1.jsonl (No space left on device)"
    )


PROGRAM = """
import logging, resource, sys
from pathlib import Path
import torch
from fedpara_plugins.ledger import Ledger, LedgerEntry
from fedpara_plugins.references import ReferenceStore
from fedpara_plugins.support import BackedStorage, MemoryStorage, Outages
logging.basicConfig(stream=sys.stdout, format="%(message)s")
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
outages = Outages()
ledger = Ledger(folder / "run.jsonl", outages=outages)
for number in range(1, 200):
    ledger.record(LedgerEntry(round=number, kind="train", direction="up", client="1", tensors=1,
                              raw_bytes=1, encoded_bytes=1))
kept = {}
for number in range(2):
    storage = BackedStorage(folder / "a.sqlite", MemoryStorage(kept), outages)
    storage["private"] = storage.get("private", b"") + b"x" * 10_000
    storage.commit()
    storage.close()
store = ReferenceStore(folder=folder / "states", outages=outages, memory_bytes=10_000_000)
digests = [store.add({"x": torch.full((5000,), float(n))}) for n in range(3)]
print("totals", ledger.totals().messages)
print("private", len(BackedStorage(folder / "a.sqlite", MemoryStorage(kept), outages)["private"]))
print("states", [float(store[digest]["x"][0]) for digest in digests])
print(outages.last_line())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
@pytest.mark.parametrize("limit", [0, 8192])
def test_real_writes_that_the_system_refuses(tmp_path, limit):
    """No file may grow beyond so many bytes in that process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(limit)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert "totals 199" in lines
    assert "private 20000" in lines
    assert "states [0.0, 1.0, 2.0]" in lines
    for what in ("the ledger at", "a client's state at", "references at"):
        assert what in lines[-1]
    assert (tmp_path / "run.jsonl").read_bytes()[-1:] in (b"", b"\n")
