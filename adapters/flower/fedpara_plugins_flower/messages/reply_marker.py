"""The record that the client's mod adds to each reply, and the server's Grid removes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, RecordDict

from fedpara_plugins import PayloadError
from fedpara_plugins.exchange import check_hashes

__all__ = ["Marker"]

MARKER_KEY = "fedpara"
HOLDS = "holds."
HAS = "has."
DECODERS = "decoders"
LACKS = "lacks"


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
        lacks: where ``lost``, the records whose frozen tensors the client has to be sent.
    """

    holds: Mapping[str, str] = field(default_factory=dict)
    fresh: bool = False
    lost: bool = False
    has: Mapping[str, Sequence[str]] = field(default_factory=dict)
    decoders: Sequence[str] = ()
    lacks: Sequence[str] = ()

    def attached_to(self, content: RecordDict) -> RecordDict:
        """Add this marker to a reply's content, and return the content."""
        record = ConfigRecord({"fresh": self.fresh, "lost": self.lost})
        record[DECODERS] = list(self.decoders)
        if self.lacks:
            record[LACKS] = list(self.lacks)
        for name, value in self.holds.items():
            record[HOLDS + name] = value
        for name, values in self.has.items():
            record[HAS + name] = list(values)
        content[MARKER_KEY] = record
        return content

    @classmethod
    def taken_from(cls, content: RecordDict, *, records: int) -> Marker | None:
        """Remove and return the marker; None if there is none: that client lacks the plugin.

        Args:
            content: of a reply, which anyone may have sent.
            records: number of records of arrays that the server sends.

        Raises:
            PayloadError: a value is of another type, or there are too many.
        """
        record = content.get(MARKER_KEY)
        if not isinstance(record, ConfigRecord):
            return None
        del content[MARKER_KEY]
        holds = {k[len(HOLDS) :]: _text(v) for k, v in record.items() if k.startswith(HOLDS)}
        has = {k[len(HAS) :]: _texts(v) for k, v in record.items() if k.startswith(HAS)}
        decoders = _texts(record.get(DECODERS, []))
        lacks = _texts(record.get(LACKS, []))
        check_hashes(holds, has, decoders, records=records)
        if len(lacks) > records:
            raise PayloadError(f"the reply lacks {len(lacks)} records, {records} are sent")
        return cls(
            holds=holds,
            fresh=_flag(record, "fresh"),
            lost=_flag(record, "lost"),
            has=has,
            decoders=decoders,
            lacks=lacks,
        )


def _flag(record: ConfigRecord, name: str) -> bool:
    value = record.get(name, False)
    if not isinstance(value, bool):
        raise PayloadError(f"the reply states {repr(value)[:80]} as {name!r}, expected a boolean")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise PayloadError(f"the reply states {repr(value)[:80]} in its marker, expected text")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise PayloadError(f"the reply states {repr(value)[:80]} in its marker, expected a list")
    return tuple(map(_text, value))
