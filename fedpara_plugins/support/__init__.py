"""Storage on disk, SQLite files, units, texts from strangers, findings of `fedpara doctor`.

May import ``errors`` and ``text``. Offers what an adapter needs to keep state and to show text.
"""

from __future__ import annotations

from fedpara_plugins.support.database import open_database
from fedpara_plugins.support.findings import Finding, Level, satisfies
from fedpara_plugins.support.storage import FileStorage, Part, Storage, replace_file
from fedpara_plugins.text import printable, shortened

__all__ = [
    "FileStorage",
    "Finding",
    "Level",
    "Part",
    "Storage",
    "open_database",
    "printable",
    "replace_file",
    "satisfies",
    "shortened",
]
