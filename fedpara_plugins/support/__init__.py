"""Parts for every other room: storage on disk, SQLite files, units, findings of `fedpara doctor`.

``torch_seams`` holds every use of something private in torch. May import ``errors`` and ``text``.
Offers what adapters need to keep state between rounds, to report findings, and to show text from
untrusted sources.
"""

from __future__ import annotations

from fedpara_plugins.support.database import Database, open_database
from fedpara_plugins.support.findings import Finding, Level, satisfies
from fedpara_plugins.support.live_runs import announced_run, other_runs
from fedpara_plugins.support.os_locks import parent_of, started_at
from fedpara_plugins.support.outages import Outages, cause_of, is_misplaced
from fedpara_plugins.support.private_files import (
    check_own_file,
    close_folder_of,
    make_private_folder,
    remove_leftovers,
    replace_file,
)
from fedpara_plugins.support.state_dir import Keeper, StateDirHold, hold_state_dir
from fedpara_plugins.support.storage import (
    BackedStorage,
    FileStorage,
    MemoryStorage,
    PrefixView,
    Storage,
)
from fedpara_plugins.text import printable, shortened

__all__ = [
    "BackedStorage",
    "Database",
    "FileStorage",
    "Finding",
    "Keeper",
    "Level",
    "MemoryStorage",
    "Outages",
    "PrefixView",
    "StateDirHold",
    "Storage",
    "announced_run",
    "cause_of",
    "check_own_file",
    "close_folder_of",
    "hold_state_dir",
    "is_misplaced",
    "make_private_folder",
    "open_database",
    "other_runs",
    "parent_of",
    "printable",
    "remove_leftovers",
    "replace_file",
    "satisfies",
    "shortened",
    "started_at",
]
