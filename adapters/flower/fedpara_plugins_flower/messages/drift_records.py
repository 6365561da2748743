"""Records that SCAFFOLD and FedDyn add to Flower's messages.

To a client: a config record with the client's task, and SCAFFOLD's variate c as a record of arrays.
To the server: a config record with the client's report, and SCAFFOLD's change of c_i as a record of
arrays. None of them contains private names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedpara_plugins import PayloadError
from fedpara_plugins_flower.messages.records import CHANGE, VARIATE

__all__ = [
    "CHANGE",
    "OPTIMIZER",
    "VARIATE",
    "ClientReport",
    "ClientTask",
    "from_bitmap",
    "to_bitmap",
]

OPTIMIZER = "fedpara.optimizer"
"""Name of the record of the task and of the report."""

UNKNOWN = -1

LONGEST_NAME = 200
MOST = 2.0**53


@dataclass(frozen=True)
class ClientTask:
    """The server's instructions for one client.

    Attributes:
        algorithm: ``scaffold`` or ``feddyn``.
        server_round: the first is 1.
        accepted: the round of this client's state that the server has; None if it has none.
        correct: whether variates or duals correct the steps; else they are only collected.
        bound: of the update's norm; None for none.
        option: SCAFFOLD's.
        alpha: FedDyn's.
    """

    algorithm: str
    server_round: int
    accepted: int | None
    correct: bool
    bound: float | None
    option: str = ""
    alpha: float = 0.0

    def to_record(self) -> ConfigRecord:
        """Return the record that is sent."""
        return ConfigRecord(
            {
                "algorithm": self.algorithm,
                "round": self.server_round,
                "accepted": UNKNOWN if self.accepted is None else self.accepted,
                "correct": self.correct,
                "bound": 0.0 if self.bound is None else self.bound,
                "option": self.option,
                "alpha": self.alpha,
            }
        )

    @classmethod
    def of(cls, message: Message) -> ClientTask | None:
        """Return the task in a message; None if its strategy is not one of the plugin's."""
        record = message.content.get(OPTIMIZER) if message.has_content() else None
        if not isinstance(record, ConfigRecord):
            return None
        accepted, bound = int(_number(record, "accepted")), _number(record, "bound")
        return cls(
            algorithm=str(record["algorithm"]),
            server_round=int(_number(record, "round")),
            accepted=None if accepted == UNKNOWN else accepted,
            correct=bool(record["correct"]),
            bound=bound or None,
            option=str(record["option"]),
            alpha=_number(record, "alpha"),
        )


@dataclass(frozen=True)
class ClientReport:
    """A client's report on its round.

    Attributes:
        client: its own name, which stays the same where the node's id changes.
        since: round of the state that it started from, 0 for zeros.
        norm: of its update, before the bound.
        kept: the fraction of the update that counts; 0 if training gave NaN.
        steps: number of optimizer steps.
        names: a bitmap of the reply's names, see `to_bitmap`: those with a variate or dual.
    """

    client: str
    since: int
    norm: float
    kept: float
    steps: int
    names: bytes

    def to_record(self) -> ConfigRecord:
        """Return the record that is sent."""
        return ConfigRecord(dict(self.__dict__))

    @classmethod
    def pop_from(cls, content: RecordDict) -> tuple[ClientReport, ArrayRecord | None] | None:
        """Remove and return a reply's report and change; None if there is no report.

        Raises:
            PayloadError: a value is missing, of another type, or out of range.
        """
        record = content.get(OPTIMIZER)
        if not isinstance(record, ConfigRecord):
            return None
        del content[OPTIMIZER]
        change = content.get(CHANGE)
        if isinstance(change, ArrayRecord):
            del content[CHANGE]
        report = cls._checked(record)
        return report, change if isinstance(change, ArrayRecord) else None

    @classmethod
    def _checked(cls, record: ConfigRecord) -> ClientReport:
        client, names = record.get("client"), record.get("names")
        if not isinstance(client, str) or len(client) > LONGEST_NAME:
            raise PayloadError(f"its report names the client {repr(client)[:80]}, expected text")
        if not isinstance(names, bytes):
            raise PayloadError(f"its report has {repr(names)[:80]} as its names, expected bytes")
        kept = _reported(record, "kept", 1.0)
        # A round that gave NaN has no norm.
        norm = _reported(record, "norm", math.inf) if kept else 0.0
        return cls(
            client=client,
            since=int(_reported(record, "since", MOST)),
            norm=norm,
            kept=kept,
            steps=int(_reported(record, "steps", MOST)),
            names=names,
        )


def to_bitmap(names: Collection[str], chosen: Collection[str]) -> bytes:
    """Return one bit for each name in alphabetical order: whether it is chosen."""
    bits = sum((name in chosen) << place for place, name in enumerate(sorted(names)))
    return bits.to_bytes(len(names) // 8 + 1, "little")


def from_bitmap(bitmap: bytes, names: Collection[str]) -> frozenset[str]:
    """Return the chosen names; the inverse of `to_bitmap`."""
    bits = int.from_bytes(bitmap, "little")
    return frozenset(name for place, name in enumerate(sorted(names)) if bits >> place & 1)


def _reported(record: ConfigRecord, key: str, most: float) -> float:
    value = record.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= most:  # type: ignore[operator]
        raise PayloadError(
            f"its report states {repr(value)[:80]} as {key!r}, expected a number from 0 to {most:g}"
        )
    return float(value)  # type: ignore[arg-type]


def _number(record: Mapping[str, object], key: str) -> float:
    value = record[key]
    if not isinstance(value, int | float):
        raise TypeError(f"{OPTIMIZER}: {key} must be a number, got {value!r}")
    return float(value)
