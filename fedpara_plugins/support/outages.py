"""What could not be written in a run: one line in the log for each, and all of it in the last line.

A disk that is full or read-only costs what was to be written, never the training.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
from pathlib import Path

__all__ = ["Outages", "as_os_error", "cause_of", "is_misplaced"]

log = logging.getLogger("fedpara")

MISPLACED = (
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
)
"""Errors of a path that leads to the wrong kind of thing; no disk would mend them."""

_SQLITE = {
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EROFS,
    "unable to open database file": errno.EACCES,
    "disk I/O error": errno.EIO,
    "database is locked": errno.EAGAIN,
}


class Outages:
    """Collects what could not be written; safe for use by threads.

    Args:
        logger: gets the lines.
    """

    def __init__(self, logger: logging.Logger = log) -> None:
        self._log = logger
        self._found: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def note(self, what: str, path: Path | str, error: Exception, so: str) -> None:
        """Note what could not be written, and log it if it is the first time.

        Args:
            what: it is, in a few words, such as ``the ledger``.
            path: of the file or folder.
            error: of the system.
            so: the consequence, as a clause.
        """
        key = what, str(path)
        with self._lock:
            if key in self._found:
                return
            self._found[key] = cause_of(error)
        self._log.error(
            "fedpara: %s cannot be written to %s (%s): %s",
            what,
            path,
            cause_of(error),
            so,
        )

    def last_line(self) -> str | None:
        """Return what is missing, for the run's last line; None if nothing is."""
        with self._lock:
            parts = [f"{what} at {path} ({why})" for (what, path), why in self._found.items()]
        return f"not or not wholly written in this run: {'; '.join(parts)}" if parts else None

    def log_last_line(self) -> None:
        """Log what is missing, if anything is."""
        if (line := self.last_line()) is not None:
            self._log.error("fedpara: %s", line)


def cause_of(error: Exception) -> str:
    """Return the system's reason in words, in one line."""
    strerror = getattr(error, "strerror", None)
    text = str(strerror or error or type(error).__name__)
    return " ".join(text.split())


def is_misplaced(error: OSError) -> bool:
    """Return whether a path leads to the wrong kind of thing, such as a folder for a file."""
    return error.errno in MISPLACED


def as_os_error(error: sqlite3.Error, path: Path | None) -> OSError | None:
    """Return the system's error behind one of SQLite; None if the disk is not its cause.

    Args:
        error: of SQLite.
        path: of the database, for the error.
    """
    if not isinstance(error, sqlite3.OperationalError):
        return None
    text = str(error)
    number = next((code for start, code in _SQLITE.items() if text.startswith(start)), None)
    return None if number is None else OSError(number, text, str(path or ":memory:"))
