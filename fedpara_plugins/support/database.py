"""SQLite files that their owner alone can read, that survive a killed process, and a full disk."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fedpara_plugins.support.outages import Outages, as_os_error
from fedpara_plugins.support.private_files import (
    check_own_file,
    make_private,
    new_private_file,
    set_aside,
)

__all__ = ["Database", "open_database", "open_read_only", "transaction"]

log = logging.getLogger("fedpara.references")

T = TypeVar("T")
Rows = list[tuple[Any, ...]]

FULL_DOWNLINK = "every client gets one full coded downlink"
BESIDE = ("-wal", "-shm", "-journal")
"""Endings of the files that SQLite keeps beside a database; it gives them the database's mode."""


class Database:
    """A database in a file, or in memory as soon as the disk refuses.

    Callers hold a lock of their own.

    Args:
        path: the file; None keeps the database in memory.
        tables: SQL that creates the tables unless they exist.
        what: it is, for the log.
        lost: the consequence of losing the file, for the log.
        outages: gets what cannot be written; None logs it alone.
    """

    def __init__(
        self,
        path: Path | None,
        tables: str,
        *,
        what: str = "a table",
        lost: str = FULL_DOWNLINK,
        outages: Outages | None = None,
    ) -> None:
        self._path = path
        self._what = what
        self._lost = lost
        self._outages = outages or Outages()
        try:
            self._connection = open_database(path, tables, lost=lost)
        except OSError as error:
            self._note(error)
            self._connection = _opened_readable(path, tables)

    def rows(self, query: str, values: tuple[object, ...] = ()) -> Rows:
        """Return the rows of a query."""
        return self._connection.execute(query, values).fetchall()

    def change(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Return a function's result; its changes are made all together, or not at all.

        Args:
            function: changes the database through the connection that it is given. If the disk
                refuses the changes, it is called again, on a copy in memory.
        """
        try:
            return self._changed(function)
        except sqlite3.OperationalError as error:
            refused = as_os_error(error, self._path)
            if refused is None or self._path is None:
                raise
            self._note(refused)
        self._move_to_memory()
        return self._changed(function)

    def _changed(self, function: Callable[[sqlite3.Connection], T]) -> T:
        with transaction(self._connection):
            return function(self._connection)

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def _note(self, error: OSError) -> None:
        if self._path is not None:
            so = f"training goes on with it in memory; in a later run {self._lost}"
            self._outages.note(self._what, self._path, error, so)

    def _move_to_memory(self) -> None:
        self._connection = _copied_to_memory(self._connection)
        self._path = None


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Make the changes in this context together, or none of them."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk may have ended it
            connection.execute("ROLLBACK")
        raise


def open_database(
    path: Path | None, tables: str, *, lost: str = FULL_DOWNLINK
) -> sqlite3.Connection:
    """Open a database with these tables, in a file of mode 0600.

    A damaged file is set aside, with a warning in the log, and replaced by an empty one.

    Args:
        path: the file; None keeps the database in memory.
        tables: SQL that creates the tables unless they exist.
        lost: the consequence of losing the file, for the log.

    Raises:
        ConfigError: something else is in the file's place, or others can read it and that cannot be
            changed.
        OSError: the file cannot be opened or written.
    """
    if path is None:
        return _opened(None, tables)
    _make_file(path)
    try:
        return _opened(path, tables)
    except sqlite3.DatabaseError as error:
        if (refused := as_os_error(error, path)) is not None:
            raise refused from error
        set_aside(path, error, lost)
        for leftover in BESIDE:
            Path(f"{path}{leftover}").unlink(missing_ok=True)
        _make_file(path)
    return _opened(path, tables)


def open_read_only(path: Path, tables: str) -> sqlite3.Connection | None:
    """Open a database on a disk that cannot be written; None if it has not these tables."""
    for options in ("mode=ro", "mode=ro&immutable=1"):
        try:
            found = sqlite3.connect(
                f"{path.absolute().as_uri()}?{options}", uri=True, check_same_thread=False,
                isolation_level=None,
            )  # fmt: skip
        except sqlite3.DatabaseError:
            continue
        try:
            _check_columns(found, tables)
            return found
        except sqlite3.DatabaseError:
            found.close()
    return None


def _make_file(path: Path) -> None:
    """Make the file and those beside it private. An existing one is not opened.

    To close it would release the locks that SQLite holds on it in this process.
    """
    if not check_own_file(path):
        os.close(new_private_file(path))
        return
    make_private(path)
    for ending in BESIDE:
        if check_own_file(beside := Path(f"{path}{ending}")):
            with contextlib.suppress(FileNotFoundError):
                make_private(beside)


def _opened(path: Path | None, tables: str) -> sqlite3.Connection:
    # With autocommit, every statement is one transaction.
    database = sqlite3.connect(
        ":memory:" if path is None else path, check_same_thread=False, isolation_level=None
    )
    try:
        # With a write-ahead log, a killed process loses nothing that was committed.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA temp_store = MEMORY")
        database.executescript(tables)
        if database.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("it fails its own check")
        if path is not None:
            _check_columns(database, tables)
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database


def _check_columns(database: sqlite3.Connection, tables: str) -> None:
    """Raise if a table of a sound file is not the one of that name that was asked for."""
    with contextlib.closing(sqlite3.connect(":memory:")) as wanted:
        wanted.executescript(tables)
        names = wanted.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in names:
            query = f"PRAGMA table_info({name})"
            if [row[1] for row in database.execute(query)] != [
                row[1] for row in wanted.execute(query)
            ]:
                raise sqlite3.DatabaseError(f"its table {name} has other columns")


def _columns(database: sqlite3.Connection, table: str) -> list[str]:
    return [str(row[1]) for row in database.execute(f"PRAGMA table_info({table})")]


def _opened_readable(path: Path | None, tables: str) -> sqlite3.Connection:
    """Return a copy in memory of what can be read of a file, or an empty database."""
    found = None if path is None else open_read_only(path, tables)
    return _opened(None, tables) if found is None else _copied_to_memory(found)


def _copied_to_memory(database: sqlite3.Connection) -> sqlite3.Connection:
    memory = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    with contextlib.closing(database):
        database.backup(memory)
    return memory
