"""The table of which client holds which reference; it survives the death of the server."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from fedpara_plugins.support.database import open_database

__all__ = ["NOTHING", "ClientIndex"]

log = logging.getLogger("fedpara.references")

IN_FLIGHT = 2
"""Unanswered messages that are remembered per slot; older ones were overtaken."""

NOTHING = ""
"""In place of a hash: the client said that it holds nothing, not even version 0."""

_TABLES = """
CREATE TABLE IF NOT EXISTS slots (
    client TEXT, record TEXT, reference TEXT, number INTEGER, held INTEGER,
    PRIMARY KEY (client, record, reference)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_reference ON slots (reference);
CREATE TABLE IF NOT EXISTS contents (reference TEXT PRIMARY KEY, content TEXT) WITHOUT ROWID;
"""


class ClientIndex:
    """For each slot (client, record): the reference that the client holds, and those in flight.

    Args:
        path: of the database; None keeps it in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._database = open_database(path, _TABLES)

    def held(self, client: str, record: str) -> str | None:
        """Return what the client said it holds: a hash, or `NOTHING`; None before it said it."""
        row = self._database.execute(
            "SELECT reference FROM slots WHERE client = ? AND record = ? AND held", (client, record)
        ).fetchone()
        return None if row is None else str(row[0])

    def content_of(self, reference: str) -> str | None:
        """Return the hash of the content that was coded as this reference, if it was noted."""
        row = self._database.execute(
            "SELECT content FROM contents WHERE reference = ?", (reference,)
        ).fetchone()
        return None if row is None else str(row[0])

    def references(self) -> set[str]:
        """Return every reference that a client holds or may be receiving now."""
        rows = self._database.execute("SELECT DISTINCT reference FROM slots").fetchall()
        return {str(row[0]) for row in rows} - {NOTHING}

    def count_clients(self) -> int:
        """Return how many clients have a slot."""
        row = self._database.execute("SELECT COUNT(DISTINCT client) FROM slots").fetchone()
        return int(row[0])

    def note_sent(self, client: str, record: str, reference: str, content: str) -> set[str]:
        """Note a message; return the references that are no longer needed.

        Args:
            client: its name.
            record: the record's name.
            reference: hash of the state that the client has once it has decoded the message.
            content: hash of the content that the message carries.
        """
        with self._transaction():
            return self._note_sent((client, record), reference, content)

    def _note_sent(self, slot: tuple[str, str], reference: str, content: str) -> set[str]:
        last = self._database.execute(
            "SELECT COALESCE(MAX(number), 0) FROM slots WHERE client = ? AND record = ?", slot
        ).fetchone()[0]
        self._database.execute(
            "INSERT INTO slots VALUES (?, ?, ?, ?, 0) "
            "ON CONFLICT (client, record, reference) DO UPDATE SET number = excluded.number",
            (*slot, reference, last + 1),
        )
        self._database.execute(
            "INSERT OR REPLACE INTO contents VALUES (?, ?)", (reference, content)
        )
        return self._delete(
            "client = ? AND record = ? AND NOT held AND number <= ?", (*slot, last + 1 - IN_FLIGHT)
        )

    def note_held(self, client: str, record: str, reference: str, *, keep: bool = True) -> set[str]:
        """Note what a client holds; return the references that are no longer needed.

        Messages that were sent later stay in flight.

        Args:
            client: its name.
            record: the record's name.
            reference: a reference that the slot `knows`.
            keep: whether the reference will be needed again.
        """
        slot = (client, record)
        with self._transaction():
            self._database.execute(
                "UPDATE slots SET held = (reference = ?) WHERE client = ? AND record = ?",
                (reference, *slot),
            )
            return self._delete(
                "client = ? AND record = ? AND (reference <> ? OR ?) AND number <= (SELECT number "
                "FROM slots WHERE client = ? AND record = ? AND reference = ?)",
                (*slot, reference, not keep, *slot, reference),
            )

    def replace(self, client: str, record: str, reference: str) -> set[str]:
        """Replace a slot by one reference or `NOTHING`; return the references no longer needed."""
        slot = (client, record)
        with self._transaction():
            self._database.execute(
                "INSERT OR REPLACE INTO slots VALUES (?, ?, ?, 0, 1)", (*slot, reference)
            )
            return self._delete("client = ? AND record = ? AND reference <> ?", (*slot, reference))

    def knows(self, client: str, record: str, reference: str) -> bool:
        """Return whether this slot holds a reference, or has it in flight."""
        row = self._database.execute(
            "SELECT 1 FROM slots WHERE client = ? AND record = ? AND reference = ?",
            (client, record, reference),
        ).fetchone()
        return row is not None

    def forget(self, client: str, record: str) -> set[str]:
        """Drop a slot; return the references that are no longer needed."""
        with self._transaction():
            return self._delete("client = ? AND record = ?", (client, record))

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _delete(self, where: str, values: tuple[object, ...]) -> set[str]:
        """Delete rows; return those of their references that no other row needs."""
        rows = self._database.execute(f"SELECT reference FROM slots WHERE {where}", values)
        gone = {str(row[0]) for row in rows.fetchall()}
        if not gone:
            return set()
        self._database.execute(f"DELETE FROM slots WHERE {where}", values)
        unused = {reference for reference in gone - {NOTHING} if not self._is_needed(reference)}
        for reference in unused:
            self._database.execute("DELETE FROM contents WHERE reference = ?", (reference,))
        return unused

    def _is_needed(self, reference: str) -> bool:
        row = self._database.execute(
            "SELECT 1 FROM slots WHERE reference = ? LIMIT 1", (reference,)
        ).fetchone()
        return row is not None
