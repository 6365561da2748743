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
import errno
import sqlite3
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedpara_plugins._moved import serve_old_names
from fedpara_plugins.support.database import open_database, open_read_only, transaction
from fedpara_plugins.support.outages import Outages, as_os_error
from fedpara_plugins.support.private_files import make_private_folder

__all__ = ["BackedStorage", "FileStorage", "MemoryStorage", "PrefixView", "Storage"]

HELD = "held/"
GONE = "gone/"
"""Prefixes of keys in a `BackedStorage`'s memory: values, and what was removed."""

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

    Its owner alone can read it. A damaged file is set aside, with a warning in the log, and
    replaced by an empty one. On a disk that cannot be written, what is there can be read.

    Args:
        path: the file; its folder is created if necessary.

    Raises:
        ConfigError: something else is in the file's place, or others can read it and that cannot be
            changed.
        OSError: there is no file, and none can be made.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.refused: OSError | None = None
        try:
            if not path.parent.is_dir():  # an existing one may hold other things
                make_private_folder(path.parent)
            lost = "this client's state in it is lost, and begins anew"
            self._database = open_database(path, _TABLES, lost=lost)
        except OSError as error:
            found = open_read_only(path, _TABLES) if path.is_file() else None
            if found is None:
                raise
            self._database, self.refused = found, error

    def close(self) -> None:
        """Discard all changes since the last `commit`, and close the file."""
        super().close()
        self._database.close()

    def _stored(self) -> dict[str, None]:
        rows = self._database.execute("SELECT key FROM entries").fetchall()
        return {str(row[0]): None for row in rows}

    def _read(self, key: str) -> bytes | None:
        row = self._database.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        return row[0] if row is not None and isinstance(row[0], bytes) else None

    def _write(self, changes: Mapping[str, bytes | None]) -> None:
        if self.refused is not None:
            raise self.refused
        gone = [(key,) for key, value in changes.items() if value is None]
        kept = [(key, value) for key, value in changes.items() if value is not None]
        try:
            with transaction(self._database):
                self._database.executemany("DELETE FROM entries WHERE key = ?", gone)
                self._database.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", kept)
        except sqlite3.OperationalError as error:
            raise as_os_error(error, self._path) or error from error


class MemoryStorage(Storage):
    """A `Storage` in a dict; it lasts as long as the process.

    Args:
        entries: the dict.
    """

    def __init__(self, entries: dict[str, bytes]) -> None:
        super().__init__()
        self._entries = entries

    def _stored(self) -> dict[str, None]:
        return dict.fromkeys(self._entries)

    def _read(self, key: str) -> bytes | None:
        return self._entries.get(key)

    def _write(self, changes: Mapping[str, bytes | None]) -> None:
        for key, value in changes.items():
            if value is None:
                self._entries.pop(key, None)
            else:
                self._entries[key] = value


class BackedStorage(Storage):
    """A `FileStorage` whose changes go to another storage for as long as the disk refuses them.

    Args:
        path: of the file.
        memory: lasts at least until the next round. Only what the disk has refused is in it.
        outages: gets what cannot be written.

    Raises:
        ConfigError: see `FileStorage`.
    """

    def __init__(self, path: Path, memory: Storage, outages: Outages) -> None:
        super().__init__()
        self._path = path
        self._memory = memory
        self._outages = outages
        self._file: FileStorage | None = None
        try:
            self._file = FileStorage(path)
        except OSError as error:
            self._note(error)

    def close(self) -> None:
        """Discard all changes since the last `commit`, and close the file."""
        super().close()
        self._memory.close()
        if self._file is not None:
            self._file.close()

    def _stored(self) -> dict[str, None]:
        held, gone = PrefixView(self._memory, HELD), PrefixView(self._memory, GONE)
        of_file: Mapping[str, None] = {} if self._file is None else self._file._stored()
        return {key: None for key in {**of_file, **dict.fromkeys(held)} if key not in gone}

    def _read(self, key: str) -> bytes | None:
        if HELD + key in self._memory:
            return self._memory[HELD + key]
        if GONE + key in self._memory or self._file is None:
            return None
        return self._file._read(key)

    def _write(self, changes: Mapping[str, bytes | None]) -> None:
        pending = self._refused_before() | dict(changes)
        try:
            if self._file is None:
                raise OSError(errno.EACCES, "it could not be opened", str(self._path))
            self._file._write(pending)
        except OSError as error:
            self._note(error)
            for key, value in changes.items():
                self._memory[(GONE if value is None else HELD) + key] = value or b""
                self._memory.pop((HELD if value is None else GONE) + key, None)
        else:
            self._memory.clear()
        self._memory.commit()

    def _refused_before(self) -> dict[str, bytes | None]:
        gone: dict[str, bytes | None] = dict.fromkeys(PrefixView(self._memory, GONE))
        return {**gone, **PrefixView(self._memory, HELD)}

    def _note(self, error: OSError) -> None:
        so = "training goes on, with what this client keeps in memory alone, until this run ends"
        self._outages.note("a client's state", self._path, error, so)


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
