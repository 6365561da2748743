"""Parts for every other room: storage on disk, SQLite files, units, findings of `fedpara doctor`.

``torch_seams`` holds every use of something private in torch. May import ``errors`` and ``text``.
Offers what adapters need to keep state between rounds, to report findings, and to show text from
untrusted sources.
"""

from __future__ import annotations

from fedpara_plugins.support.database import open_database
from fedpara_plugins.support.findings import Finding, Level, satisfies
from fedpara_plugins.support.storage import FileStorage, PrefixView, Storage, replace_file
from fedpara_plugins.text import printable, shortened

__all__ = [
    "FileStorage",
    "Finding",
    "Level",
    "PrefixView",
    "Storage",
    "open_database",
    "printable",
    "replace_file",
    "satisfies",
    "shortened",
]
