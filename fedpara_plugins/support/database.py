"""SQLite files that survive a killed process and are set aside when damaged."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

__all__ = ["open_database"]

log = logging.getLogger("fedpara.references")


def open_database(
    path: Path | None, tables: str, *, lost: str = "every client gets one full coded downlink"
) -> sqlite3.Connection:
    """A database with these tables, in memory without a path.

    A damaged file is set aside, with a line in the log, and an empty one begun.

    Args:
        path: of the file.
        tables: SQL that makes the tables unless they are there.
        lost: what it means that a file is damaged, for the log.
    """
    try:
        return _opened(path, tables)
    except sqlite3.DatabaseError as error:
        if path is None or isinstance(error, sqlite3.OperationalError):
            raise
        log.warning("fedpara: %s is damaged (%s) and was set aside: %s", path, error, lost)
        path.replace(path.with_suffix(".damaged"))
        for leftover in ("-wal", "-shm"):
            Path(f"{path}{leftover}").unlink(missing_ok=True)
        return _opened(path, tables)


def _opened(path: Path | None, tables: str) -> sqlite3.Connection:
    # Callers hold a lock of their own. Autocommit: every statement is one transaction.
    database = sqlite3.connect(
        ":memory:" if path is None else path, check_same_thread=False, isolation_level=None
    )
    try:
        # With a write-ahead log, a killed process loses nothing that was committed.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.executescript(tables)
        if database.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("it fails its own check")
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database
