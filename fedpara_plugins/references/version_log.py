"""The states that were published, in their order; on disk if a folder is given."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpara_plugins.support.database import Database
from fedpara_plugins.support.outages import Outages

__all__ = ["Version", "VersionLog"]

log = logging.getLogger("fedpara.references")

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
        outages: gets what cannot be written; the versions go on in memory then.
    """

    def __init__(self, path: Path | None, *, keep: int, outages: Outages | None = None) -> None:
        self._database = Database(path, _TABLES, what="the list of versions", outages=outages)
        self._keep = keep

    def last(self, record: str) -> Version | None:
        """Return the newest version of a record; None before the first.

        One that is damaged in the file counts as none, with a warning in the log.
        """
        rows = self._database.rows(
            "SELECT number, reference, content, exponents FROM versions WHERE record = ? "
            "ORDER BY number DESC LIMIT 1",
            (record,),
        )
        try:
            return _version(*rows[0]) if rows else None
        except (ValueError, TypeError, RecursionError) as error:
            log.warning(
                "fedpara: the last version of %r is damaged (%s): its versions begin anew",
                record,
                error,
            )
        forget = "DELETE FROM versions WHERE record = ?"
        self._database.change(lambda database: database.execute(forget, (record,)))
        return None

    def add(self, record: str, version: Version) -> None:
        """Append a version; delete the oldest if there are too many."""
        row = version.number, version.reference, version.content
        exponents = json.dumps(dict(version.exponents))

        def change(database: sqlite3.Connection) -> None:
            database.execute(
                "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?)", (record, *row, exponents)
            )
            database.execute(
                "DELETE FROM versions WHERE record = ? AND number <= ?",
                (record, version.number - self._keep),
            )

        self._database.change(change)

    def references(self) -> set[str]:
        """Return the hashes of all versions that are kept."""
        return {str(row[0]) for row in self._database.rows("SELECT reference FROM versions")}

    def close(self) -> None:
        """Close the database."""
        self._database.close()


def _version(number: object, reference: object, content: object, exponents: Any) -> Version:
    steps = json.loads(exponents)
    if type(number) is not int or type(reference) is not str or type(content) is not str:
        raise TypeError("a number or hash of another type")
    if type(steps) is not dict or any(type(v) not in (int, type(None)) for v in steps.values()):
        raise TypeError("exponents that are no numbers")
    return Version(number, reference, content, steps)
