"""Files and folders that their owner alone can read, and files that are written whole.

On POSIX: files 0600, folders 0700, whatever the umask. On Windows, modes do not exist, and files
inherit the access rights of their folder.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
from pathlib import Path

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.support.os_locks import try_lock
from fedpara_plugins.support.outages import is_misplaced

__all__ = [
    "check_own_file",
    "close_folder_of",
    "make_private",
    "make_private_folder",
    "new_private_file",
    "remove_leftovers",
    "replace_file",
    "set_aside",
]

log = logging.getLogger("fedpara")

PARTIAL = ".partial"
CHUNK = 2**30
"""Bytes in one write: systems refuse, or shorten, much larger ones."""

OTHERS = stat.S_IRWXG | stat.S_IRWXO
POSIX = os.name == "posix"


# Folders and modes


def make_private_folder(path: Path) -> None:
    """Make a folder that its owner alone can read, or make an existing one so.

    Args:
        path: of the folder; folders above it are made as the umask says.

    Raises:
        ConfigError: something else is in its place, or it cannot be made private.
        OSError: the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
            _set_mode(path, 0o700)  # the umask may have taken more than it should
            return
        found = _existing(path)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"fedpara: {path}: expected a folder, but a file is in its place or above it "
            f"({error.strerror}): move it away, or choose another folder"
        ) from error
    except OSError as error:
        raise _odd(path, error) from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(
            f"fedpara: {path}: expected a folder, found {_kind(found.st_mode)}: move it away, or "
            f"choose another folder"
        )
    make_private(path, found)


def make_private(path: Path, found: os.stat_result | None = None, *, say: bool = True) -> bool:
    """Take from an existing file or folder what others may do with it.

    Args:
        path: of the file or folder.
        found: its status, if the caller knows it.
        say: whether to log a change.

    Returns:
        Whether others could read it until now.

    Raises:
        ConfigError: it belongs to another user, or its file system keeps no modes.
        OSError: it is not there.
    """
    found = found or path.stat()
    if not POSIX or not found.st_mode & OTHERS:
        return False
    was, mode = stat.S_IMODE(found.st_mode), 0o700 if stat.S_ISDIR(found.st_mode) else 0o600
    why = "its file system keeps no modes"
    try:
        _set_mode(path, mode)
    except OSError as error:
        if error.errno == errno.EROFS:
            log.warning("fedpara: %s is open to other users (mode %04o): %s", path, was, error)
            return True
        why = f"{error.strerror}; it belongs to user {found.st_uid}, this process is {os.geteuid()}"
    if path.stat().st_mode & OTHERS:
        raise ConfigError(
            f"fedpara: {path} holds private state, others may read it (mode {was:04o}), and that "
            f"cannot be changed ({why}): choose another place"
        )
    if say:
        log.warning(
            "fedpara: %s was open to other users (mode %04o) and is closed to them now (%04o)",
            path, was, mode,
        )  # fmt: skip
    return True


def close_folder_of(folder: Path, ours: str, *, also: str = "") -> None:
    """Close the files of a pattern to other users, and the folder if nothing else is in it.

    Args:
        folder: that exists.
        ours: pattern of the files' names.
        also: pattern of names that make the folder no one else's, too.

    Raises:
        ConfigError: see `make_private`.
    """
    others = False
    for path in folder.iterdir():
        if path.match(ours):
            if path.is_file() and not path.is_symlink():
                make_private(path)
        else:
            others = others or not (also and path.match(also))
    if not others and not folder.stat().st_mode & stat.S_ISVTX:
        make_private(folder)


def _set_mode(path: Path, mode: int) -> None:
    if POSIX:
        path.chmod(mode)


def check_own_file(path: Path) -> bool:
    """Return whether there is an ordinary file; False if there is nothing.

    Raises:
        ConfigError: something else is in its place.
        OSError: the disk refuses.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _odd(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(
            f"fedpara: {path}: expected a file, found {_kind(found.st_mode)}: move it away, or "
            f"choose another folder"
        )
    return True


def new_private_file(path: Path) -> int:
    """Make a file of mode 0600, which must not exist, and return its descriptor."""
    descriptor = _new_file(path, 0o600)
    if POSIX:
        os.fchmod(descriptor, 0o600)
    return descriptor


def _new_file(path: Path, mode: int) -> int:
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), mode)


def _odd(path: Path, error: OSError) -> Exception:
    if not is_misplaced(error):
        return error
    return ConfigError(
        f"fedpara: {path} leads nowhere ({error.strerror}): move it away, or choose another folder"
    )


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(mode)), "a device")


def set_aside(path: Path, why: object, lost: str) -> None:
    """Rename a damaged entry, with a warning in the log.

    Args:
        path: of the entry.
        why: what is wrong with it.
        lost: the consequence, for the log.

    Raises:
        OSError: the disk refuses.
    """
    aside, number = path.with_suffix(".damaged"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_suffix(f".{number}.damaged")
    log.warning(
        "fedpara: %s is damaged (%s) and was set aside as %s: %s", path, why, aside.name, lost
    )
    path.replace(aside)


def _existing(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise ConfigError(
            f"fedpara: {path}: expected a folder, found a symbolic link that leads nowhere: remove "
            f"it, or choose another folder"
        ) from None


# Files that are written whole


def replace_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file; if the process is killed, the file has its old content or all of the new.

    Args:
        path: of the file.
        data: its content.
        private: whether its owner alone may read it; a missing folder is made then.

    Raises:
        OSError: the disk refuses; the file has its old content then.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    if private and not path.parent.exists():
        make_private_folder(path.parent)
    descriptor = new_private_file(partial) if private else _new_file(partial, 0o666)
    try:
        try:
            try_lock(descriptor)  # `remove_leftovers` of another process leaves it alone
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view[:CHUNK]) :]
            if POSIX:
                os.replace(partial, path)
        finally:
            os.close(descriptor)
        if not POSIX:  # an open file cannot be renamed
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path, patterns: tuple[str, ...]) -> None:
    """Remove what killed writers left in a folder; files that a process is writing stay.

    Args:
        folder: to search; those below it are not.
        patterns: of the names.
    """
    for pattern in patterns:
        for path in folder.glob(pattern):
            try:
                if stat.S_ISREG(path.lstat().st_mode) and not _in_use(path):
                    path.unlink()
                    log.info("fedpara: removed %s, which a killed process had left", path)
            except FileNotFoundError:
                continue  # another process was faster
            except OSError as error:
                log.warning("fedpara: %s is left over and cannot be removed: %s", path, error)


def _in_use(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        return try_lock(descriptor) is False
    finally:
        os.close(descriptor)
