"""The runs of one group whose servers live on this machine, of this user.

A client that is between two messages of one run cannot know that this run goes on. Another run's
server can tell it, if it sees the first one's.

Each server keeps a file in a folder of the system's temporary one, locked by the operating system;
the lock ends with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.support.os_locks import try_lock
from fedpara_plugins.support.private_files import make_private_folder, new_private_file

__all__ = ["announced_run", "other_runs"]

log = logging.getLogger("fedpara")

ENDING = ".run"
MOST = 64
"""Runs that are told: each message names them."""

_held: set[int] = set()
"""Descriptors of this process; a forked worker must not keep the lock of a killed server."""


@contextlib.contextmanager
def announced_run(run: str, group: str) -> Iterator[None]:
    """Let other servers of a group know that a run goes on, while this context is open.

    On a disk that refuses the file, or a system without locks, they do not learn of it.

    Args:
        run: its id.
        group: of the servers; "" announces nothing.
    """
    if not group:
        yield
        return
    descriptor, path = None, None
    try:
        path = _folder() / f"{_safe(group)}.{_safe(run)}{ENDING}"
        descriptor = _locked(path)
    except (ConfigError, OSError) as error:
        log.debug("fedpara: run %s is not announced to others here: %s", run, error)
    try:
        yield
    finally:
        if descriptor is not None and path is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            _held.discard(descriptor)
            os.close(descriptor)


def other_runs(run: str, group: str) -> list[str]:
    """Return the ids of other runs of a group whose servers live here; at most 64.

    Args:
        run: the caller's own.
        group: of the servers; "" has no others.
    """
    if not group:
        return []
    start = f"{_safe(group)}."
    found: list[str] = []
    with contextlib.suppress(ConfigError, OSError):
        for path in sorted(_folder().glob(f"{start}*{ENDING}")):
            name = path.name.removeprefix(start).removesuffix(ENDING)
            if name != _safe(run) and _lives(path):
                found.append(name)
    return found[:MOST]


def _folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"fedpara-runs-{user}"
    make_private_folder(folder)
    return folder


def _safe(text: str) -> str:
    return "".join(each if each.isalnum() or each in "-_" else "_" for each in text)[:100]


def _locked(path: Path) -> int | None:
    """Make the file; it gets its name when it is locked: without a lock, it is a dead run's."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = new_private_file(partial)
    try:
        if not try_lock(descriptor):
            os.close(descriptor)
            return None
        os.replace(partial, path)
    except OSError:
        os.close(descriptor)
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    _held.add(descriptor)
    return descriptor


def _lives(path: Path) -> bool:
    """Return whether a run goes on; the file of one that was killed is removed."""
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        if try_lock(descriptor) is False:
            return True
        path.unlink(missing_ok=True)
        return False
    finally:
        os.close(descriptor)


def _forget() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
