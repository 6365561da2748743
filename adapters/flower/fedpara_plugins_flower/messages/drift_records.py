"""What SCAFFOLD and FedDyn add to Flower's messages, in both directions, and its names.

Down: a config record that says what to do, and SCAFFOLD's variate c as a record of arrays. Up: a
config record with what the client did, and SCAFFOLD's change of c_i as a record of arrays. Private
names are in none of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flwr.common import ArrayRecord, ConfigRecord, Message, RecordDict

from fedpara_plugins_flower.messages.records import CHANGE, VARIATE

__all__ = ["CHANGE", "TASK", "VARIATE", "Report", "Task", "marked", "names_of"]

TASK = "fedpara.optimizer"
UNKNOWN = -1


@dataclass(frozen=True)
class Task:
    """What the server asks of one client.

    Attributes:
        algorithm: ``scaffold`` or ``feddyn``.
        server_round: the first is 1.
        accepted: of which round the server has this client's state; None if it does not know it.
        correct: whether variates or duals act; else they are only collected.
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
        """As it travels."""
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
    def of(cls, message: Message) -> Task | None:
        """What a message asks; None if its strategy is none of ours."""
        record = message.content.get(TASK) if message.has_content() else None
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
class Report:
    """What a client says of its round.

    Attributes:
        client: its own name, which may outlive the node's id.
        since: of which round the state is that it started from, 0 for zeros.
        norm: of its update, before the bound.
        kept: the share of the update that counts; 0 for NaN.
        steps: of optimizers.
        names: a bit for each of the record's names in alphabetical order: has a variate or dual.
    """

    client: str
    since: int
    norm: float
    kept: float
    steps: int
    names: bytes

    def to_record(self) -> ConfigRecord:
        """As it travels."""
        return ConfigRecord(dict(self.__dict__))

    @classmethod
    def taken_from(cls, content: RecordDict) -> tuple[Report, ArrayRecord | None] | None:
        """Remove and return a reply's report and its change; None if there is none."""
        record = content.get(TASK)
        if not isinstance(record, ConfigRecord):
            return None
        del content[TASK]
        change = content.get(CHANGE)
        if isinstance(change, ArrayRecord):
            del content[CHANGE]
        names = record["names"]
        report = cls(
            client=str(record["client"]),
            since=int(_number(record, "since")),
            norm=_number(record, "norm"),
            kept=_number(record, "kept"),
            steps=int(_number(record, "steps")),
            names=names if isinstance(names, bytes) else b"",
        )
        return report, change if isinstance(change, ArrayRecord) else None


def marked(names: Collection[str], chosen: Collection[str]) -> bytes:
    """One bit for each name in alphabetical order: whether it is chosen."""
    bits = sum((name in chosen) << place for place, name in enumerate(sorted(names)))
    return bits.to_bytes(len(names) // 8 + 1, "little")


def names_of(mask: bytes, names: Collection[str]) -> frozenset[str]:
    """Undo `marked`."""
    bits = int.from_bytes(mask, "little")
    return frozenset(name for place, name in enumerate(sorted(names)) if bits >> place & 1)


def _number(record: Mapping[str, object], key: str) -> float:
    value = record[key]
    if not isinstance(value, int | float):
        raise TypeError(f"{TASK}: {key} must be a number, got {value!r}")
    return float(value)
