"""Which client holds which reference: a small table that survives the server's death."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from fedpara_plugins.support.database import open_database

__all__ = ["HeldIndex"]

log = logging.getLogger("fedpara.references")

IN_FLIGHT = 2
"""Messages without an answer that are remembered a slot; older ones were overtaken."""

NOTHING = ""
"""Stands for a client that said it holds nothing, not even version 0."""

_TABLES = """
CREATE TABLE IF NOT EXISTS slots (
    client TEXT, record TEXT, reference TEXT, number INTEGER, held INTEGER,
    PRIMARY KEY (client, record, reference)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_reference ON slots (reference);
CREATE TABLE IF NOT EXISTS contents (reference TEXT PRIMARY KEY, content TEXT) WITHOUT ROWID;
"""


class HeldIndex:
    """For each slot (client, record): the reference that is held, and those in flight.

    Args:
        path: of the database; None keeps it in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._database = open_database(path, _TABLES)

    def held(self, client: str, record: str) -> str | None:
        """What the client said it holds; None before it said anything, `NOTHING` for nothing."""
        row = self._database.execute(
            "SELECT reference FROM slots WHERE client = ? AND record = ? AND held", (client, record)
        ).fetchone()
        return None if row is None else str(row[0])

    def content(self, reference: str) -> str | None:
        """Hash of the content whose coded form a reference is, if it was noted."""
        row = self._database.execute(
            "SELECT content FROM contents WHERE reference = ?", (reference,)
        ).fetchone()
        return None if row is None else str(row[0])

    def used(self) -> set[str]:
        """Every reference that a client holds or may just be receiving."""
        rows = self._database.execute("SELECT DISTINCT reference FROM slots").fetchall()
        return {str(row[0]) for row in rows} - {NOTHING}

    def clients(self) -> int:
        """How many clients hold something."""
        row = self._database.execute("SELECT COUNT(DISTINCT client) FROM slots").fetchone()
        return int(row[0])

    def sent(self, client: str, record: str, reference: str, content: str) -> set[str]:
        """Note a message; returns the references that nobody needs any more."""
        with self._transaction():
            return self._sent((client, record), reference, content)

    def _sent(self, slot: tuple[str, str], reference: str, content: str) -> set[str]:
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
        return self._dropped(
            "client = ? AND record = ? AND NOT held AND number <= ?", (*slot, last + 1 - IN_FLIGHT)
        )

    def hold(self, client: str, record: str, reference: str, *, keep: bool = True) -> set[str]:
        """Note what a client holds; returns the references that nobody needs any more.

        Messages that were sent later than it stay in flight.

        Args:
            client: its name.
            record: the record's name.
            reference: one that the slot `knows`.
            keep: False if it will not be needed any more.
        """
        slot = (client, record)
        with self._transaction():
            self._database.execute(
                "UPDATE slots SET held = (reference = ?) WHERE client = ? AND record = ?",
                (reference, *slot),
            )
            return self._dropped(
                "client = ? AND record = ? AND (reference <> ? OR ?) AND number <= (SELECT number "
                "FROM slots WHERE client = ? AND record = ? AND reference = ?)",
                (*slot, reference, not keep, *slot, reference),
            )

    def only(self, client: str, record: str, reference: str) -> set[str]:
        """Replace all of a slot by what the client says it has, or `NOTHING`."""
        slot = (client, record)
        with self._transaction():
            self._database.execute(
                "INSERT OR REPLACE INTO slots VALUES (?, ?, ?, 0, 1)", (*slot, reference)
            )
            return self._dropped("client = ? AND record = ? AND reference <> ?", (*slot, reference))

    def knows(self, client: str, record: str, reference: str) -> bool:
        """Whether a reference is held by, or in flight to, that very slot."""
        row = self._database.execute(
            "SELECT 1 FROM slots WHERE client = ? AND record = ? AND reference = ?",
            (client, record, reference),
        ).fetchone()
        return row is not None

    def forget(self, client: str, record: str) -> set[str]:
        """Drop a slot; returns the references that nobody needs any more."""
        with self._transaction():
            return self._dropped("client = ? AND record = ?", (client, record))

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

    def _dropped(self, where: str, values: tuple[object, ...]) -> set[str]:
        rows = self._database.execute(f"SELECT reference FROM slots WHERE {where}", values)
        gone = {str(row[0]) for row in rows.fetchall()}
        if not gone:
            return set()
        self._database.execute(f"DELETE FROM slots WHERE {where}", values)
        unused = {reference for reference in gone - {NOTHING} if not self._needed(reference)}
        for reference in unused:
            self._database.execute("DELETE FROM contents WHERE reference = ?", (reference,))
        return unused

    def _needed(self, reference: str) -> bool:
        row = self._database.execute(
            "SELECT 1 FROM slots WHERE reference = ? LIMIT 1", (reference,)
        ).fetchone()
        return row is not None
