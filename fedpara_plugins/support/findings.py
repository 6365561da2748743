"""Findings of `fedpara doctor`, and the comparison of a version with a requirement."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Level", "satisfies"]

Level = Literal["ok", "note", "attention"]


@dataclass(frozen=True)
class Finding:
    """One finding of `fedpara doctor`; ``str(finding)`` is the line that it prints.

    Attributes:
        level: ``ok``; ``note`` for something correct that users should know; ``attention`` for
            something that they should change.
        subject: what was checked.
        text: what was found, and what to do about it.
    """

    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<9}  {self.subject}: {self.text}"


def satisfies(found: str, wanted: str) -> bool:
    """Return whether a version is in a range such as ``>=1.26,<2`` or ``==0.9.6``.

    Only numbers are compared: a suffix such as ``rc1`` or ``+cpu`` is ignored. A condition with an
    unknown operator counts as met.

    Args:
        found: the version.
        wanted: the range; every version is in an empty one.
    """
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>)\s*(.+)", part)
        if match is None:
            continue
        have, limit = _numbers(found), _numbers(match[2])
        length = max(len(have), len(limit))
        have, limit = (v + (0,) * (length - len(v)) for v in (have, limit))
        holds = {
            ">=": have >= limit,
            "<=": have <= limit,
            "==": have == limit,
            "!=": have != limit,
            "<": have < limit,
            ">": have > limit,
        }
        if not holds[match[1]]:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    release = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(int(part) for part in release[0].split(".")) if release else ()
