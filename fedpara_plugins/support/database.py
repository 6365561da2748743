"""SQLite files that survive a killed process, and are set aside if they are damaged."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

__all__ = ["open_database"]

log = logging.getLogger("fedpara.references")


def open_database(
    path: Path | None, tables: str, *, lost: str = "every client gets one full coded downlink"
) -> sqlite3.Connection:
    """Open a database with these tables.

    A damaged file is set aside, with a warning in the log, and replaced by an empty one.

    Args:
        path: the file; None keeps the database in memory.
        tables: SQL that creates the tables unless they exist.
        lost: the consequence of losing the file, for the log.

    Raises:
        sqlite3.OperationalError: the file cannot be opened or written.
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
    # Callers hold a lock of their own. With autocommit, every statement is one transaction.
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
