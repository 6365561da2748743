"""Files that strangers name or send: only regular ones are opened."""

from __future__ import annotations

import stat
from pathlib import Path

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.text import printable

__all__ = ["check_regular"]

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path) -> None:
    """Raise unless a path leads to a regular file: others have no end, or block whoever reads.

    Raises:
        ConfigError: it leads to something else.
        OSError: there is nothing, or it cannot be looked at.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ConfigError(f"{printable(str(path))}: expected a file, this is {kind}")
