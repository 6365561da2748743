"""The table of which client holds which reference; it survives the death of the server."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from fedpara_plugins.support.database import Database
from fedpara_plugins.support.outages import Outages

__all__ = ["NOTHING", "ClientIndex"]

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
        outages: gets what cannot be written; the table goes on in memory then.
    """

    def __init__(self, path: Path | None, outages: Outages | None = None) -> None:
        what = "the table of what clients hold"
        self._database = Database(path, _TABLES, what=what, outages=outages)

    def held(self, client: str, record: str) -> str | None:
        """Return what the client said it holds: a hash, or `NOTHING`; None before it said it."""
        rows = self._database.rows(
            "SELECT reference FROM slots WHERE client = ? AND record = ? AND held", (client, record)
        )
        return str(rows[0][0]) if rows else None

    def content_of(self, reference: str) -> str | None:
        """Return the hash of the content that was coded as this reference, if it was noted."""
        query = "SELECT content FROM contents WHERE reference = ?"
        rows = self._database.rows(query, (reference,))
        return str(rows[0][0]) if rows else None

    def references(self) -> set[str]:
        """Return every reference that a client holds or may be receiving now."""
        rows = self._database.rows("SELECT DISTINCT reference FROM slots")
        return {str(row[0]) for row in rows} - {NOTHING}

    def count_clients(self) -> int:
        """Return how many clients have a slot."""
        return int(self._database.rows("SELECT COUNT(DISTINCT client) FROM slots")[0][0])

    def note_sent(self, client: str, record: str, reference: str, content: str) -> set[str]:
        """Note a message; return the references that are no longer needed.

        Args:
            client: its name.
            record: the record's name.
            reference: hash of the state that the client has once it has decoded the message.
            content: hash of the content that the message carries.
        """
        slot = client, record

        def change(database: sqlite3.Connection) -> set[str]:
            query = "SELECT COALESCE(MAX(number), 0) FROM slots WHERE client = ? AND record = ?"
            last = int(database.execute(query, slot).fetchone()[0])
            database.execute(
                "INSERT INTO slots VALUES (?, ?, ?, ?, 0) ON CONFLICT (client, record, reference) "
                "DO UPDATE SET number = excluded.number",
                (*slot, reference, last + 1),
            )
            database.execute("INSERT OR REPLACE INTO contents VALUES (?, ?)", (reference, content))
            overtaken = "client = ? AND record = ? AND NOT held AND number <= ?"
            return _delete(database, overtaken, (*slot, last + 1 - IN_FLIGHT))

        return self._database.change(change)

    def note_held(self, client: str, record: str, reference: str, *, keep: bool = True) -> set[str]:
        """Note what a client holds; return the references that are no longer needed.

        Messages that were sent later stay in flight.

        Args:
            client: its name.
            record: the record's name.
            reference: a reference that the slot `knows`.
            keep: whether the reference will be needed again.
        """
        slot = client, record

        def change(database: sqlite3.Connection) -> set[str]:
            database.execute(
                "UPDATE slots SET held = (reference = ?) WHERE client = ? AND record = ?",
                (reference, *slot),
            )
            return _delete(
                database,
                "client = ? AND record = ? AND (reference <> ? OR ?) AND number <= (SELECT number "
                "FROM slots WHERE client = ? AND record = ? AND reference = ?)",
                (*slot, reference, not keep, *slot, reference),
            )

        return self._database.change(change)

    def replace(self, client: str, record: str, reference: str) -> set[str]:
        """Replace a slot by one reference or `NOTHING`; return the references no longer needed."""
        slot = client, record

        def change(database: sqlite3.Connection) -> set[str]:
            database.execute(
                "INSERT OR REPLACE INTO slots VALUES (?, ?, ?, 0, 1)", (*slot, reference)
            )
            others = "client = ? AND record = ? AND reference <> ?"
            return _delete(database, others, (*slot, reference))

        return self._database.change(change)

    def knows(self, client: str, record: str, reference: str) -> bool:
        """Return whether this slot holds a reference, or has it in flight."""
        rows = self._database.rows(
            "SELECT 1 FROM slots WHERE client = ? AND record = ? AND reference = ?",
            (client, record, reference),
        )
        return bool(rows)

    def forget(self, client: str, record: str) -> set[str]:
        """Drop a slot; return the references that are no longer needed."""
        whole = "client = ? AND record = ?"
        return self._database.change(lambda database: _delete(database, whole, (client, record)))

    def close(self) -> None:
        """Close the database."""
        self._database.close()


def _delete(database: sqlite3.Connection, where: str, values: tuple[object, ...]) -> set[str]:
    """Delete rows; return those of their references that no other row needs."""
    rows = database.execute(f"SELECT reference FROM slots WHERE {where}", values)
    gone = {str(row[0]) for row in rows.fetchall()}
    if not gone:
        return set()
    database.execute(f"DELETE FROM slots WHERE {where}", values)
    unused = {each for each in gone - {NOTHING} if not _is_needed(database, each)}
    for reference in unused:
        database.execute("DELETE FROM contents WHERE reference = ?", (reference,))
    return unused


def _is_needed(database: sqlite3.Connection, reference: str) -> bool:
    query = "SELECT 1 FROM slots WHERE reference = ? LIMIT 1"
    return database.execute(query, (reference,)).fetchone() is not None
