"""What a client keeps between rounds: named bytes that change together, or not at all.

    storage = FileStorage(Path("state/clients/hospital-3.sqlite"))
    storage["private"] = payload
    storage.commit()                       # a process that is killed leaves all of it, or none

Private state, references, error feedback and an optimizer's variates all lie here, so that a client
never holds half of a round. Frameworks that keep a client's state themselves implement `Storage` on
top of that.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from fedpara_plugins.support.database import open_database

__all__ = ["FileStorage", "Part", "Storage", "replace_file"]

_TABLES = "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;"


class Storage(MutableMapping[str, bytes]):
    """Bytes by key. Changes are seen at once by this object, and last from `commit` on."""

    def __init__(self) -> None:
        self._changed: dict[str, bytes | None] = {}

    def __getitem__(self, key: str) -> bytes:
        value = self._changed[key] if key in self._changed else self._read(key)
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: bytes) -> None:
        self._changed[key] = bytes(value)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._changed[key] = None

    def __contains__(self, key: object) -> bool:
        if key in self._changed:
            return self._changed[str(key)] is not None
        return key in self._stored()

    def __iter__(self) -> Iterator[str]:
        return iter([key for key in {**self._stored(), **self._changed} if key in self])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def commit(self) -> None:
        """Make all changes since the last time permanent, in one step."""
        if self._changed:
            self._write(self._changed)
            self._changed = {}

    def close(self) -> None:
        """Drop all changes since the last `commit`; the object is not used afterwards."""
        self._changed = {}

    @abc.abstractmethod
    def _stored(self) -> dict[str, None]:
        """The keys that are stored."""

    @abc.abstractmethod
    def _read(self, key: str) -> bytes | None:
        """What is stored under a key."""

    @abc.abstractmethod
    def _write(self, changes: Mapping[str, bytes | None]) -> None:
        """Store all of it, or nothing; None removes a key."""


class FileStorage(Storage):
    """A `Storage` in one SQLite file, which survives a process that is killed while it writes.

    A damaged file is set aside, with a line in the log, and an empty one begun.

    Args:
        path: of the file; its folder is created if need be.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        path.parent.mkdir(parents=True, exist_ok=True)
        lost = "this client's state in it is lost, and begins anew"
        self._database = open_database(path, _TABLES, lost=lost)

    def close(self) -> None:
        """Close the file too."""
        super().close()
        self._database.close()

    def _stored(self) -> dict[str, None]:
        rows = self._database.execute("SELECT key FROM entries").fetchall()
        return {str(row[0]): None for row in rows}

    def _read(self, key: str) -> bytes | None:
        row = self._database.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def _write(self, changes: Mapping[str, bytes | None]) -> None:
        gone = [(key,) for key, value in changes.items() if value is None]
        kept = [(key, value) for key, value in changes.items() if value is not None]
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._database.executemany("DELETE FROM entries WHERE key = ?", gone)
            self._database.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", kept)
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file; a process that is killed leaves what was there before, or all of this."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


class Part(MutableMapping[str, bytes]):
    """The entries of a mapping whose keys begin alike, without that beginning."""

    def __init__(self, whole: MutableMapping[str, bytes], prefix: str) -> None:
        self._whole = whole
        self._prefix = prefix

    def __getitem__(self, key: str) -> bytes:
        return self._whole[self._prefix + key]

    def __setitem__(self, key: str, value: bytes) -> None:
        self._whole[self._prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self._whole[self._prefix + key]

    def __contains__(self, key: object) -> bool:
        return f"{self._prefix}{key}" in self._whole

    def __iter__(self) -> Iterator[str]:
        start = len(self._prefix)
        return (key[start:] for key in self._whole if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
