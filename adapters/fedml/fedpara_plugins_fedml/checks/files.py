"""Files and folders of a run, tried before it begins: what is found later is found too late."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fedpara_plugins import ConfigError
from fedpara_plugins_fedml.settings import Settings

__all__ = ["check_files"]

FILES = ("ledger", "checkpoint")
SERVERS = (*FILES, "state_dir")
CLIENTS = ("client_checkpoints", "state_dir")


def check_files(settings: Settings, *, server: bool, client: bool) -> None:
    """Make the folders that a process will write to, and write to each once.

    Args:
        settings: of the run.
        server: whether this process is the server.
        client: whether it trains.

    Raises:
        ConfigError: names the key, the path and what the system says.
    """
    for name in dict.fromkeys((*(SERVERS if server else ()), *(CLIENTS if client else ()))):
        path = getattr(settings, name)
        if path is not None:
            _try(f"fedpara_{name}", path, a_file=name in FILES)


def _try(key: str, path: Path, *, a_file: bool) -> None:
    try:
        if a_file and path.is_dir():
            raise IsADirectoryError(None, "it is a folder, expected a file's name")
        folder = path.parent if a_file else path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if a_file and path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(None, "it is there, and may not be written")
    except OSError as error:
        raise ConfigError(
            f"fedpara: {key}: nothing can be written to {path} ({error.strerror}): name a place "
            f"where this process may write, or remove the key"
        ) from error
