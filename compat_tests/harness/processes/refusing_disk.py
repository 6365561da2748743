"""A disk that refuses everything below a folder, as a full or read-only one does."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fedpara_plugins.support import database, private_files

__all__ = ["refuse_writes"]


def refuse_writes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the system refuse every new file, folder and database below a folder from now on."""

    def refused(path: Path) -> bool:
        return path.is_relative_to(folder)

    new_file, opened, plain_open = private_files._new_file, database._opened, Path.open
    mkdir = Path.mkdir

    def new(path: Path, mode: int) -> int:
        if refused(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return new_file(path, mode)

    def open_database(path: Path | None, tables: str) -> sqlite3.Connection:
        if path is not None and refused(path):
            raise sqlite3.OperationalError("database or disk is full")
        return opened(path, tables)

    def append(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "a" in mode and refused(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return plain_open(path, mode, *args, **kwargs)

    def make(path: Path, *args: Any, **kwargs: Any) -> None:
        if refused(path) and not path.exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(private_files, "_new_file", new)
    monkeypatch.setattr(database, "_opened", open_database)
    monkeypatch.setattr(Path, "open", append)
    monkeypatch.setattr(Path, "mkdir", make)
