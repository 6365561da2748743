"""Test writes to the files and folders of a run, before it begins."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from fedpara_plugins import ConfigError
from fedpara_plugins.exchange import close_own_checkpoints
from fedpara_plugins.support import cause_of, is_misplaced, make_private_folder
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = ["check_files"]

FILES = ("ledger", "checkpoint")
OF_SERVER = (*FILES, "state_dir")
OF_CLIENTS = ("client_checkpoints", "state_dir")


def check_files(settings: FedMLSettings, *, server: bool, client: bool) -> None:
    """Make the folders that a process will write to, and write to each of them once.

    A disk that refuses costs what was to be written: it is named in the log.

    Args:
        settings: of the run.
        server: whether this process is the server.
        client: whether it trains.

    Raises:
        ConfigError: if a path leads to the wrong kind of thing; names the key, the path and the
            system's reason.
    """
    for name in dict.fromkeys((*(OF_SERVER if server else ()), *(OF_CLIENTS if client else ()))):
        path = getattr(settings, name)
        if path is not None:
            _try_to_write(name, path)


def _try_to_write(name: str, path: Path) -> None:
    is_file = name in FILES
    try:
        if is_file and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, expected a file's name")
        folder = path.parent if is_file else path
        if name in OF_CLIENTS and not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            make_private_folder(path)
        folder.mkdir(parents=True, exist_ok=True)
        if name == "client_checkpoints":
            close_own_checkpoints(path)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if is_file and path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "it exists and is not writable")
    except OSError as error:
        if not is_misplaced(error):
            log.warning(
                "fedpara: fedpara_%s: nothing can be written to %s (%s): the run goes on without",
                name,
                path,
                cause_of(error),
            )
            return
        raise ConfigError(
            f"fedpara: fedpara_{name}: nothing can be written to {path} ({error.strerror}): name a "
            f"place where this process may write, or remove the key"
        ) from error
