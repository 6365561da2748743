"""The record that the client's mod adds to each reply, and the server's Grid removes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, RecordDict

__all__ = ["Marker", "has_marker"]

MARKER_KEY = "fedpara"
HOLDS = "holds."
HAS = "has."
DECODERS = "decoders"


def has_marker(content: RecordDict) -> bool:
    """Return whether a reply comes from a client that has the plugin."""
    return isinstance(content.get(MARKER_KEY), ConfigRecord)


@dataclass(frozen=True)
class Marker:
    """The information in a client's reply besides its arrays.

    Attributes:
        holds: by record name, the hash of the reference that the client has received and kept.
        fresh: whether the client had no private state and started from the seeded first one.
        lost: whether the client lacks the reference that the message was coded against; the app was
            not called then.
        has: in that case, by record name, the hashes of the references that it holds.
        decoders: names of the entropy stages that the client can decode.
    """

    holds: Mapping[str, str] = field(default_factory=dict)
    fresh: bool = False
    lost: bool = False
    has: Mapping[str, Sequence[str]] = field(default_factory=dict)
    decoders: Sequence[str] = ()

    def attached_to(self, content: RecordDict) -> RecordDict:
        """Add this marker to a reply's content, and return the content."""
        record = ConfigRecord({"fresh": self.fresh, "lost": self.lost})
        record[DECODERS] = list(self.decoders)
        for name, value in self.holds.items():
            record[HOLDS + name] = value
        for name, values in self.has.items():
            record[HAS + name] = list(values)
        content[MARKER_KEY] = record
        return content

    @classmethod
    def taken_from(cls, content: RecordDict) -> Marker | None:
        """Remove and return the marker; None if there is none: that client lacks the plugin."""
        record = content.get(MARKER_KEY)
        if not isinstance(record, ConfigRecord):
            return None
        del content[MARKER_KEY]
        holds = {k[len(HOLDS) :]: str(v) for k, v in record.items() if k.startswith(HOLDS)}
        has = {k[len(HAS) :]: _texts(v) for k, v in record.items() if k.startswith(HAS)}
        return cls(
            holds=holds,
            fresh=bool(record.get("fresh")),
            lost=bool(record.get("lost")),
            has=has,
            decoders=_texts(record.get(DECODERS)),
        )


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()
