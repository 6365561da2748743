"""The state that a client keeps between rounds: named bytes that change all together.

    storage = FileStorage(Path("state/clients/hospital-3.sqlite"))
    storage["private"] = payload
    storage.commit()                       # if the process is killed, all changes last, or none

Private state, references, error feedback and an optimizer's variates are all kept here, so that a
client never holds half of a round. An adapter whose framework keeps the clients' state implements
`Storage` on top of it.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedpara_plugins._moved import serve_old_names
from fedpara_plugins.support.database import open_database

__all__ = ["FileStorage", "PrefixView", "Storage", "replace_file"]

_TABLES = "CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;"


class Storage(MutableMapping[str, bytes]):
    """Bytes by key; this object sees its changes at once, and `commit` makes them permanent."""

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
        """Make all changes since the last `commit` permanent, in one step."""
        if self._changed:
            self._write(self._changed)
            self._changed = {}

    def close(self) -> None:
        """Discard all changes since the last `commit`; do not use the object afterwards."""
        self._changed = {}

    @abc.abstractmethod
    def _stored(self) -> dict[str, None]:
        """Return the stored keys, in order."""

    @abc.abstractmethod
    def _read(self, key: str) -> bytes | None:
        """Return the bytes stored under a key; None if there are none."""

    @abc.abstractmethod
    def _write(self, changes: Mapping[str, bytes | None]) -> None:
        """Store all changes, or none if it fails; the value None removes a key."""


class FileStorage(Storage):
    """A `Storage` in one SQLite file, which stays intact if the process is killed as it writes.

    A damaged file is set aside, with a warning in the log, and replaced by an empty one.

    Args:
        path: the file; its folder is created if necessary.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        path.parent.mkdir(parents=True, exist_ok=True)
        lost = "this client's state in it is lost, and begins anew"
        self._database = open_database(path, _TABLES, lost=lost)

    def close(self) -> None:
        """Discard all changes since the last `commit`, and close the file."""
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
    """Write a file; if the process is killed, the file has its old content or all of the new."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


class PrefixView(MutableMapping[str, bytes]):
    """A view of a mapping's entries whose keys begin with a prefix, under keys without it."""

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


if not TYPE_CHECKING:
    __getattr__ = serve_old_names(__name__, {"Part": "PrefixView"})
