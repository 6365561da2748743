"""A state-dir in use: private, whole, and held by one run at a time.

    with hold_state_dir(Path("state"), run="17", role="server"):
        ...

Each process that uses a state-dir keeps a file in ``locks/`` there, locked by the operating system,
which says its run, host and process id. The lock ends with the process, however it ends.

A process that lives for one message alone names its `Keeper`, which holds the folder between them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.support.os_locks import started_at, try_lock
from fedpara_plugins.support.outages import Outages
from fedpara_plugins.support.private_files import (
    check_own_file,
    make_private,
    make_private_folder,
    new_private_file,
    remove_leftovers,
    replace_file,
)
from fedpara_plugins.text import printable, shortened

__all__ = ["Keeper", "StateDirHold", "hold_state_dir"]

log = logging.getLogger("fedpara")

LOCKS = "locks"
KEEPER = ".keeper"
PARTS = ("server", "clients", LOCKS)
"""The folders in a state-dir, all of them private."""

LEFTOVERS = ("*.partial", "*.tmp", ".tmp*")
PATIENCE = 60.0
"""Seconds to wait for another process that is joining or leaving."""


@dataclass(frozen=True)
class Keeper:
    """A process that holds a state-dir as long as it lives, for short-lived ones that it starts.

    Attributes:
        pid: its id.
        started: see `started_at`.
        group: what it belongs to; keepers of one group share a state-dir, and each other one is
            refused, whatever its run.
        what: in words, for the error.
    """

    pid: int
    started: str
    group: str
    what: str = ""


class StateDirHold:
    """A process's share in a state-dir, until `release`; also a context manager."""

    def __init__(self, member: _Member | None, role: str = "") -> None:
        self._member = member
        self._role = role

    def release(self) -> None:
        """Give the share back; a second call does nothing."""
        member, self._member = self._member, None
        if member is not None:
            with _process_lock:
                member.leave(self._role)

    def __enter__(self) -> StateDirHold:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def hold_state_dir(
    folder: Path,
    *,
    run: str,
    role: str = "",
    keeper: Keeper | None = None,
    others: Collection[str] = (),
    outages: Outages | None = None,
) -> StateDirHold:
    """Take part in a run that uses a state-dir.

    The first process of a run also makes all that is there private, and removes what killed
    processes left unfinished. On a disk that refuses the lock's file, the run goes on without.

    Args:
        folder: the state-dir, made if it is missing.
        run: the run's id; processes that name the same one share the folder.
        role: what this process is in the run, where only one process may be; "" for any number.
        keeper: the process that goes on holding the folder when this one has ended.
        others: runs that are known to go on, besides this one. Keepers of one group leave the
            folder from one run to the next, and a run that goes on keeps it between its messages.
        outages: gets what cannot be written; None logs it alone.

    Raises:
        ConfigError: another run or keeper uses the folder, or another process has the same role;
            something else is in the place of a folder; or others can read it and that cannot be
            changed.
    """
    outages = outages or Outages()
    try:
        _prepare(folder)
        with _process_lock:
            return StateDirHold(_joined(folder, run, role, keeper, others), role)
    except OSError as error:
        outages.note(
            "the lock of the state-dir",
            folder,
            error,
            "training goes on, and no other run is kept out",
        )
        return StateDirHold(None)


# Members of a run

_process_lock = threading.RLock()
_members: dict[str, _Member] = {}
"""What this process holds, by the folder's real path. Forked children hold nothing."""


class _Member:
    """This process as a member of a run.

    Args:
        key: of `_members`.
        folder: of the locks.
        run: the run's id.
    """

    def __init__(self, key: str, folder: Path, run: str) -> None:
        self.run = run
        self.roles: Counter[str] = Counter()
        self._key = key
        self._folder = folder
        self._path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.member"
        self._descriptor = new_private_file(self._path)
        try_lock(self._descriptor)

    def add(self, role: str) -> None:
        """Take a role."""
        self.roles[role] += 1
        about = {
            "run": self.run,
            "roles": sorted(filter(None, self.roles)),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        with contextlib.suppress(OSError):  # a full disk: the lock stands, and nobody is named
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, json.dumps(about).encode())

    def leave(self, role: str) -> None:
        """Give a role back, and the lock with the last one."""
        self.roles[role] -= 1
        self.roles += Counter()
        if self.roles:
            return
        _members.pop(self._key, None)
        os.close(self._descriptor)
        with contextlib.suppress(OSError):
            self._path.unlink()

    def close(self) -> None:
        """Close the descriptor that a forked child has inherited; the parent's lock stays."""
        os.close(self._descriptor)


def _forget_members() -> None:
    global _process_lock
    _process_lock = threading.RLock()
    for member in _members.values():
        with contextlib.suppress(OSError):
            member.close()
    _members.clear()


if hasattr(os, "register_at_fork"):
    # A killed process's lock must not live on in the workers that it has forked.
    os.register_at_fork(after_in_child=_forget_members)


def _joined(
    folder: Path, run: str, role: str, keeper: Keeper | None, others: Collection[str]
) -> _Member:
    key = os.path.realpath(folder)
    member = _members.get(key)
    locks = folder / LOCKS
    if member is not None:
        if member.run != run:
            raise _refusal(folder, {"run": member.run, "pid": os.getpid()}, run, role)
        if keeper is not None:
            with _mutex(locks):
                _check_keepers(folder, run, keeper, others)
                _keep(locks, run, keeper)
        member.add(role)
        return member
    with _mutex(locks):
        if keeper is not None:  # before the members: a keeper stays, and they come and go
            _check_keepers(folder, run, keeper, others)
        present = [about for path in locks.glob("*.member") if (about := _living(path)) is not None]
        for about in present:
            if about.get("run") != run or (role and role in (about.get("roles") or ())):
                raise _refusal(folder, about, run, role)
        if keeper is not None:
            _keep(locks, run, keeper)
        if not present:
            _tidy(folder)
        member = _Member(key, locks, run)
        member.add(role)
        _members[key] = member
        return member


def _check_keepers(folder: Path, run: str, keeper: Keeper, others: Collection[str]) -> None:
    """Raise if a keeper of another group lives, or one that works for a run that goes on."""
    host = socket.gethostname()
    for path in (folder / LOCKS).glob(f"*{KEEPER}"):
        about = _about(path.read_bytes())
        here, pid = about.get("host") == host, about.get("pid")
        alive = type(pid) is int and (not here or started_at(pid) == about.get("started"))
        if not alive:
            path.unlink(missing_ok=True)
            continue
        about = about if here else {**about, "file": path}
        if about.get("group") != keeper.group:
            raise _refusal(folder, about, run, "")
        if about.get("run") != run and about.get("run") in others:
            raise _refusal(folder, {**about, "goes on": True}, run, "")


def _keep(locks: Path, run: str, keeper: Keeper) -> None:
    """Note that a process holds the folder from now on, for a run."""
    host = socket.gethostname()
    path = locks / f"{host}-{keeper.pid}{KEEPER}".replace(os.sep, "_")
    text = json.dumps({"run": run, "host": host, **asdict(keeper)}).encode()
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == text:
            return
    replace_file(path, text, private=True)


def _living(path: Path) -> Mapping[str, Any] | None:
    """Return what a member says of itself; None, and its file is removed, if it has ended.

    Raises:
        ConfigError: it is no file; a pipe would never be read to its end.
    """
    if not check_own_file(path):
        return None
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        locked = try_lock(descriptor)
        about = _about(os.read(descriptor, 4096))
    finally:
        os.close(descriptor)
    if locked is None:
        locked = _is_gone(about)
        about = {**about, "file": path}
    if not locked:
        return about
    path.unlink(missing_ok=True)
    return None


def _about(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_gone(about: Mapping[str, Any]) -> bool:
    """Return whether a process is known to have ended, where the file system has no locks."""
    pid = about.get("pid")
    if about.get("host") != socket.gethostname() or type(pid) is not int or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _refusal(folder: Path, about: Mapping[str, Any], run: str, role: str) -> ConfigError:
    other = about.get("run")
    holder = (
        f"run {other if other is not None else 'of unknown id'}, host "
        f"{about.get('host', socket.gethostname())}, process {about.get('pid', 'of unknown id')}"
    )
    mend = "Choose another state-dir, or wait until that run has ended"
    if what := about.get("what"):
        holder += f" ({what})"
        if not about.get("goes on"):
            mend = "Choose another state-dir, or end that process"
    holder = printable(shortened(holder, 200))
    if (file := about.get("file")) is not None:
        mend += f"; its file system has no locks: if that process is gone, remove {file}"
    what = f"run {run}" if other != run else f"a second {role} of run {run}"
    return ConfigError(f"fedpara: {folder} is in use by {holder}: refused to {what}. {mend}")


@contextlib.contextmanager
def _mutex(locks: Path) -> Iterator[None]:
    """Let one process at a time look at the members and change them."""
    path = locks / "mutex"
    if not check_own_file(path):
        with contextlib.suppress(FileExistsError):
            os.close(new_private_file(path))
    descriptor = os.open(path, os.O_RDWR)
    try:
        until = time.monotonic() + PATIENCE
        while try_lock(descriptor) is False:
            if time.monotonic() > until:
                raise ConfigError(
                    f"fedpara: another process has been busy with {locks} for {PATIENCE:.0f} s: is "
                    f"it stopped? End it, or choose another state-dir"
                )
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


# What is there already


def _prepare(folder: Path) -> None:
    """Make the folders that hold private state, or make those that are there private.

    The state-dir itself is left open where it holds other things too, such as a home: its parts
    are closed in any case.
    """
    if not os.path.lexists(folder) or _is_ours(folder):
        make_private_folder(folder)
    for part in PARTS:
        make_private_folder(folder / part)


def _is_ours(folder: Path) -> bool:
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            return True  # `make_private_folder` refuses it
        if folder.stat().st_mode & stat.S_ISVTX:
            return False
        entries = os.listdir(folder)
    except OSError:
        return True
    real = Path(os.path.realpath(folder))
    if any(real in (place, *place.parents) for place in _places_of_the_user()):
        return False
    return not entries or any(part in entries for part in PARTS)


def _places_of_the_user() -> list[Path]:
    """Return the home and the current folder, which hold more than this state."""
    places = []
    for place in (Path.home, Path.cwd):
        with contextlib.suppress(OSError, RuntimeError):
            places.append(Path(os.path.realpath(place())))
    return places


def _tidy(folder: Path) -> None:
    """Close all that is in a state-dir to others, and remove what was left unfinished."""
    closed = 0
    for part in PARTS:
        for place, folders, files in os.walk(folder / part):
            here = Path(place)
            remove_leftovers(here, LEFTOVERS)
            for name in (*folders, *files):
                with contextlib.suppress(FileNotFoundError):
                    found = (here / name).lstat()
                    if stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode):
                        closed += make_private(here / name, found, say=False)
    if closed:
        log.warning(
            "fedpara: %d files and folders in %s were open to other users and are closed to them "
            "now (files 0600, folders 0700)",
            closed,
            folder,
        )
