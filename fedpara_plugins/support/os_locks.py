"""Locks of the operating system, which end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import os
import sys

__all__ = ["try_lock"]

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
