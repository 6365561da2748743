"""Locks of the operating system, which end with the process that holds them, however it ends.

And the start of a process, which tells it from a later one with the same id.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

__all__ = ["parent_of", "started_at", "try_lock"]

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without locks answer."""

FAR = 2**30
"""Windows locks bytes, and forbids reading them: a byte beyond the content is locked."""


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file for as long as it is open; do not wait.

    Args:
        descriptor: of a file open for writing.

    Returns:
        Whether this descriptor has the lock now; False if another one has it, in this process or in
        any other; None if the file system, or the platform, has no locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, FAR, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return None
    except OSError as error:
        return None if error.errno in UNSUPPORTED else False
    return True


def started_at(pid: int) -> str | None:
    """Return when a process of this machine started, in the system's ticks since it is up.

    Returns:
        None if there is no such process, or the platform has no ``/proc`` (Linux has it).
    """
    fields = _fields_of(pid)
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else None


def parent_of(pid: int) -> int | None:
    """Return the process that has started another one; None where that cannot be known."""
    fields = _fields_of(pid)
    return int(fields[1]) if len(fields) > 1 else None


def _fields_of(pid: int) -> list[str]:
    """Return what ``/proc`` says of a process after its name: state, parent, and so on."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
