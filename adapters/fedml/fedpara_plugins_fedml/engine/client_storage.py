"""The storage of what each client keeps between rounds: in memory, or a file of its own."""

from __future__ import annotations

from pathlib import Path

from fedpara_plugins.support import BackedStorage, MemoryStorage, Outages, Storage
from fedpara_plugins_fedml.logs import log

__all__ = ["ClientStorages"]


class ClientStorages:
    """Opens the storage of a client by its name.

    Args:
        state_dir: the option of that name: files lie in ``clients/`` there, and survive a process
            that is killed; None keeps everything in memory.

    Attributes:
        outages: what the clients of this process could not write. It stays in memory.
    """

    def __init__(self, state_dir: Path | None) -> None:
        self.outages = Outages(log)
        self._folder = state_dir and state_dir / "clients"
        self._memory: dict[str, dict[str, bytes]] = {}

    def open(self, client: str) -> Storage:
        """Return the client's storage; to be closed by the caller.

        Raises:
            ConfigError: something else is in the place of the client's file.
        """
        memory = MemoryStorage(self._memory.setdefault(client, {}))
        if self._folder is None:
            return memory
        return BackedStorage(self._folder / f"{client}.sqlite", memory, self.outages)
