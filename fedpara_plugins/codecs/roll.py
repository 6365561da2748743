"""The roll of a message: what its records were, which two sides share and name by its hash.

Joint payloads refer to it: names, hashes of descriptions and of references need not be repeated.
Like a description it is text that is put into other text, and trusted no more than any other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fedpara_plugins.codecs.json_reader import strict_json
from fedpara_plugins.errors import PayloadError

__all__ = ["MOST_JOINED", "NO_ROLL", "Roll", "RollRow"]

MOST_JOINED = 64
"""Records of a joint payload, and rows of a roll."""

NO_ROLL = "0" * 32
"""Stands in the place of the hash where a joint payload refers to no roll."""


class RollRow(NamedTuple):
    """One record of a message.

    Attributes:
        name: of the record.
        description: hash of its `Description`.
        reference: hash of the tensors that it was decoded to.
        tensors: their number.
    """

    name: str
    description: str
    reference: str
    tensors: int


@dataclass(frozen=True)
class Roll:
    """The records of a message, in its order.

    Attributes:
        rows: one for each.
    """

    rows: tuple[RollRow, ...]

    @cached_property
    def text(self) -> str:
        """The rows as JSON."""
        return json.dumps([list(row) for row in self.rows], separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """The first 128 bits of the text's SHA-256, as 32 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @property
    def names(self) -> tuple[str, ...]:
        """The records' names, in order."""
        return tuple(row.name for row in self.rows)

    @property
    def references(self) -> dict[str, str]:
        """By record, the hash of what it was decoded to."""
        return {row.name: row.reference for row in self.rows}

    def to_bytes(self) -> bytes:
        """Return the text, for a file of one's own."""
        return self.text.encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Roll | None:
        """Return what `to_bytes` stored; None if it is damaged."""
        try:
            rows = strict_json(data.decode("ascii"))
            return cls(tuple(RollRow(*row) for row in rows))
        except (PayloadError, UnicodeDecodeError, TypeError):
            return None
