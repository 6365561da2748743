"""Test writes to the files and folders of a run, before it begins."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fedpara_plugins import ConfigError
from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = ["check_files"]

FILES = ("ledger", "checkpoint")
OF_SERVER = (*FILES, "state_dir")
OF_CLIENTS = ("client_checkpoints", "state_dir")


def check_files(settings: FedMLSettings, *, server: bool, client: bool) -> None:
    """Make the folders that a process will write to, and write to each of them once.

    Args:
        settings: of the run.
        server: whether this process is the server.
        client: whether it trains.

    Raises:
        ConfigError: if a path cannot be written to; names the key, the path and the system's
            reason.
    """
    for name in dict.fromkeys((*(OF_SERVER if server else ()), *(OF_CLIENTS if client else ()))):
        path = getattr(settings, name)
        if path is not None:
            _try_to_write(f"fedpara_{name}", path, is_file=name in FILES)


def _try_to_write(key: str, path: Path, *, is_file: bool) -> None:
    try:
        if is_file and path.is_dir():
            raise IsADirectoryError(None, "it is a folder, expected a file's name")
        folder = path.parent if is_file else path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if is_file and path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(None, "it exists and is not writable")
    except OSError as error:
        raise ConfigError(
            f"fedpara: {key}: nothing can be written to {path} ({error.strerror}): name a place "
            f"where this process may write, or remove the key"
        ) from error
