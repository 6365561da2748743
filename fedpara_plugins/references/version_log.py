"""The states that were published, in their order; on disk if a folder is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpara_plugins.support.database import open_database

__all__ = ["Version", "VersionLog"]

_TABLES = """
CREATE TABLE IF NOT EXISTS versions (
    record TEXT, number INTEGER, reference TEXT, content TEXT, exponents TEXT,
    PRIMARY KEY (record, number)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Version:
    """One published state.

    Attributes:
        number: its number in the record, from 1 on.
        reference: its hash.
        content: hash of the exact state that it stands for.
        exponents: exponents of the steps that led to it, by name.
    """

    number: int
    reference: str
    content: str
    exponents: Mapping[str, int | None]


class VersionLog:
    """The last versions of each record.

    Args:
        path: of the database; None keeps it in memory.
        keep: number of versions kept of each record.
    """

    def __init__(self, path: Path | None, *, keep: int) -> None:
        self._database = open_database(path, _TABLES)
        self._keep = keep

    def last(self, record: str) -> Version | None:
        """Return the newest version of a record; None before the first."""
        row = self._database.execute(
            "SELECT number, reference, content, exponents FROM versions WHERE record = ? "
            "ORDER BY number DESC LIMIT 1",
            (record,),
        ).fetchone()
        return None if row is None else Version(row[0], row[1], row[2], json.loads(row[3]))

    def add(self, record: str, version: Version) -> None:
        """Append a version; delete the oldest if there are too many."""
        self._database.execute("BEGIN IMMEDIATE")
        self._database.execute(
            "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?)",
            (
                record,
                version.number,
                version.reference,
                version.content,
                json.dumps(dict(version.exponents)),
            ),
        )
        self._database.execute(
            "DELETE FROM versions WHERE record = ? AND number <= ?",
            (record, version.number - self._keep),
        )
        self._database.execute("COMMIT")

    def references(self) -> set[str]:
        """Return the hashes of all versions that are kept."""
        return {str(row[0]) for row in self._database.execute("SELECT reference FROM versions")}

    def close(self) -> None:
        """Close the database."""
        self._database.close()
