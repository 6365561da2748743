"""Findings of `fedpara doctor`, and versions against requirements."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Level", "satisfies"]

Level = Literal["ok", "note", "attention"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer.

    Attributes:
        level: ``ok``; ``note`` for what is as it should be and worth knowing; ``attention`` for
            what should be changed.
        subject: what was looked at.
        text: what was found, and what to do about it.
    """

    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<9}  {self.subject}: {self.text}"


def satisfies(found: str, wanted: str) -> bool:
    """Whether a version lies in a range such as ``>=1.26,<2`` or ``==0.9.6``.

    Numbers only: a suffix such as ``rc1`` or ``+cpu`` counts for nothing. An operator that is not
    known here is taken as met.
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
