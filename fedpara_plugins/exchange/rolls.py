"""All records of a message in one payload, for sides that read it; and the rolls they share."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping

from fedpara_plugins.codecs import (
    JOINT,
    Description,
    Roll,
    RollRow,
    can_join,
    join_payloads,
    separate_payloads,
)
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.exchange.headers import decoders_of
from fedpara_plugins.exchange.incoming import ReceivedRecord

__all__ = [
    "JOINT_RECORD",
    "SharedRolls",
    "answered_roll",
    "joined",
    "reads_joint",
    "separated",
]

JOINT_RECORD = "fedpara_joint"
"""Name of the record that carries all records of a message."""

REMEMBERED = 4
"""Rolls of what was last sent to a client, which its answer may refer to."""

NO_ROWS = Roll(())


def joined(
    payloads: Mapping[str, bytes], roll: Roll | None, tensors: Mapping[str, int]
) -> dict[str, bytes]:
    """Return payloads as one, if they can be.

    Args:
        payloads: by name of the record.
        roll: that the receiver holds; None for none.
        tensors: their numbers of tensors.
    """
    if not can_join(payloads):
        return dict(payloads)
    return {JOINT_RECORD: join_payloads(payloads, roll=roll or NO_ROWS, tensors=tensors)}


def separated(
    payloads: Mapping[str, bytes], rolls: Mapping[str, Roll], *, limit: int | None
) -> dict[str, bytes]:
    """Undo `joined`; the sender is not trusted. Other payloads pass.

    Args:
        payloads: by name of the record.
        rolls: those that this side holds, by hash.
        limit: bytes that the tensors of all of them may have; None for no limit.

    Raises:
        LostDescriptionError: a roll is not held.
        PayloadError: damaged, or two records of one name.
    """
    others = {name: data for name, data in payloads.items() if name != JOINT_RECORD}
    if JOINT_RECORD not in payloads:
        return others
    found = separate_payloads(payloads[JOINT_RECORD], rolls=rolls, limit=limit)
    if twice := sorted(found.keys() & others.keys()):
        raise PayloadError(f"the message holds record {twice[0][:80]!r} twice")
    return {**found, **others}


def answered_roll(received: Mapping[str, ReceivedRecord]) -> Roll | None:
    """Return the roll of a message, for the answer; None where it has one record.

    Args:
        received: its records by name.
    """
    if len(received) < 2:
        return None
    rows = (
        RollRow(
            name,
            Description.of(part.held.header.model, part.held.tensors).digest,
            part.held.reference,
            len(part.held.tensors),
        )
        for name, part in received.items()
    )
    return Roll(tuple(rows))


def reads_joint(received: Mapping[str, ReceivedRecord]) -> bool:
    """Return whether the sender of a message says that it reads joint payloads.

    Args:
        received: its records by name.
    """
    return all(JOINT in decoders_of(part.held.header) for part in received.values())


class SharedRolls(Mapping[str, Roll]):
    """By hash, the rolls of what a server has last sent; and which of them each client holds.

    Nothing here survives the process: a server that starts again names no roll until clients
    answer.
    """

    def __init__(self) -> None:
        self._rolls: dict[str, Roll] = {}
        self._users: Counter[str] = Counter()
        self._sent: dict[str, deque[str]] = {}
        self._held: dict[str, Roll] = {}

    def __getitem__(self, digest: str) -> Roll:
        return self._rolls[digest]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rolls)

    def __len__(self) -> int:
        return len(self._rolls)

    def held(self, client: str, records: Collection[str]) -> Roll | None:
        """Return the roll that a client holds, if it is one of these records, in this order."""
        found = self._held.get(client)
        return found if found is not None and found.names == tuple(records) else None

    def note_sent(self, client: str, roll: Roll) -> None:
        """Note that a client is sent a message of these records."""
        sent = self._sent.setdefault(client, deque())
        if roll.digest in sent:
            sent.remove(roll.digest)
            sent.append(roll.digest)
            return
        self._rolls[roll.digest] = roll
        self._users[roll.digest] += 1
        sent.append(roll.digest)
        if len(sent) > REMEMBERED:
            self._drop(sent.popleft())

    def note_held(self, client: str, holds: Mapping[str, str]) -> None:
        """Note what a client has kept of a message.

        Args:
            client: its name.
            holds: by record, the hash of the tensors.
        """
        for digest in reversed(self._sent.get(client, ())):
            roll = self._rolls[digest]
            if all(holds.get(row.name) == row.reference for row in roll.rows):
                self._held[client] = roll
                return

    def forget(self, client: str) -> None:
        """Note that a client has lost something, so that it may have lost everything."""
        self._held.pop(client, None)

    def sent_to(self, client: str) -> tuple[str, ...]:
        """Return the names of the records that a client was last sent together."""
        sent = self._sent.get(client)
        return self._rolls[sent[-1]].names if sent else ()

    def _drop(self, digest: str) -> None:
        self._users[digest] -= 1
        if not self._users[digest]:
            del self._users[digest], self._rolls[digest]
