"""The record by which a server tells clients which other runs go on; only if there are any."""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

__all__ = ["note_other_runs", "take_other_runs"]

KEY = "fedpara.other-runs"
IDS = "ids"


def note_other_runs(content: RecordDict, runs: list[str]) -> None:
    """Add the record to a message's content, if there are such runs."""
    if runs:
        content[KEY] = ConfigRecord({IDS: runs})


def take_other_runs(content: RecordDict) -> list[str]:
    """Remove the record from a message's content, and return the ids in it."""
    record = content.get(KEY)
    if not isinstance(record, ConfigRecord):
        return []
    del content[KEY]
    found = record.get(IDS)
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []
