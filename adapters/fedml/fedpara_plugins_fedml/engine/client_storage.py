"""The storage of what each client keeps between rounds: in memory, or a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedpara_plugins.support import FileStorage, Storage

__all__ = ["ClientStorages", "MemoryStorage"]


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


class ClientStorages:
    """Opens the storage of a client by its name.

    Args:
        state_dir: the option of that name: files lie in ``clients/`` there, and survive a process
            that is killed; None keeps everything in memory.
    """

    def __init__(self, state_dir: Path | None) -> None:
        self._folder = state_dir and state_dir / "clients"
        self._memory: dict[str, dict[str, bytes]] = {}

    def open(self, client: str) -> Storage:
        """Return the client's storage; to be closed by the caller."""
        if self._folder is not None:
            return FileStorage(self._folder / f"{client}.sqlite")
        return MemoryStorage(self._memory.setdefault(client, {}))
