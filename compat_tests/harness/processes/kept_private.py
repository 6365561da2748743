"""A record of what clients keep private while they run in this process, and the search for it.

Private values are noted at the moment at which a client stores them, so that they are what training
has made of them, in each round and for each client. Afterwards every byte that left a client is
searched for them, and everything that a receiver decodes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fedpara_plugins.codecs import (
    Description,
    Roll,
    RollRow,
    decode_payload,
    peek_header,
    reference_hash,
    separate_payloads,
)
from fedpara_plugins.errors import FedParaError
from fedpara_plugins.exchange import FROZEN, JOINT_RECORD, ClientRound, ClientState
from fedpara_plugins.models import ModelSpec
from fedpara_plugins.references.version_zero import reference_from_header
from harness.processes.canaries import Canaries

__all__ = ["KeptPrivate", "Traffic", "decoded", "kept_private"]

State = dict[str, Tensor]

LARGEST = 10**9
MOST = 256
"""Places of each tensor that are searched for: a leak of a hundredth of it is found."""
SOME = 12
"""Tensors that are searched for by correlation, which costs a transform for each pair."""


@dataclass(frozen=True)
class Traffic:
    """One message.

    Attributes:
        direction: ``up`` from a client, or ``down``.
        data: all of its bytes.
        payloads: those in it, by record.
    """

    direction: Literal["down", "up"] | str
    data: bytes
    payloads: Mapping[str, bytes]


class KeptPrivate:
    """What clients kept, and what they shared.

    Attributes:
        names: of the private tensors.
        private: their values, each time that a client kept them, and the dense weights of which
            they are a part.
        seeded: values that every party can derive.
        shared: all other tensors of the same answers.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.private: list[Tensor] = []
        self.seeded: list[Tensor] = []
        self.shared: list[State] = []
        self._answered: list[State] = []

    @classmethod
    def of(
        cls, states: Iterable[Mapping[str, Tensor]], names: set[str], seeded: Mapping[str, Tensor]
    ) -> KeptPrivate:
        """Return what clients of other processes kept.

        Args:
            states: of their models, after each training.
            names: of what is private.
            seeded: the state that all models start from.
        """
        found = cls()
        found.names = names
        found.seeded = [seeded[name] for name in names]
        for state in states:
            found.private += [state[name] for name in names]
            found.shared.append({k: v for k, v in state.items() if k not in names})
        return found

    def answer(self, records: Iterable[Mapping[str, Tensor]]) -> None:
        """Note what a user's code has answered, before anything is taken out of it."""
        self._answered = [{k: v.detach().clone() for k, v in each.items()} for each in records]

    def keep(self, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        """Note what a client keeps of it."""
        self.names |= tensors.keys()
        self.private += [value.detach().clone() for value in tensors.values()]
        self.seeded += spec.initial_private().values()
        halves = [weight for weight, plan in spec.weights.items() if plan.private_names]
        for answer in self._answered:
            composed = {**answer, **tensors}
            if halves and set(spec.shared_keys) <= composed.keys():
                dense = spec.dense_state(composed)
                # W0 of the residual form is shared: the update of it is the secret.
                bases = {weight: composed[key] for weight, key in spec.base_keys.items()}
                self.private += [dense[weight] - bases.get(weight, 0) for weight in halves]
            self.private += [answer[weight] for weight in halves if weight in answer]
            shared = set(spec.shared_keys) & answer.keys()
            self.shared.append({name: answer[name] for name in shared})

    def check(self, traffic: Sequence[Traffic]) -> None:
        """Assert that no byte that left a client, and nothing decoded of it, is private.

        Args:
            traffic: all messages, in order.
        """
        if not self.private:
            return
        private, seeded = _distinct(self.private), _distinct(self.seeded)
        canaries = Canaries(private, known=seeded, most=MOST)
        data = b"".join(each.data for each in traffic if each.direction == "up")
        found = canaries.found_in(data)
        assert not found, f"{found} runs of private values left a client"
        answers = decoded(traffic, "up")
        for tensors in answers:
            names = canaries.found_among(tensors, close=False)
            names += sorted(self.names & tensors.keys())
            assert not names, f"private values left a client as {names}"
        # The same tensor is alike in all rounds, and all answers come about alike: some of each
        # show what a lossy codec has changed.
        some = Canaries(private[:: len(private) // SOME + 1], known=seeded, most=MOST)
        for tensors in answers[:1] + answers[1:][-1:]:
            names = some.found_among(tensors)
            assert not names, f"values near to private ones left a client as {names}"

    def check_control(self, traffic: Sequence[Traffic], *, raw: bool) -> None:
        """Assert that the same search finds what was shared, in the same traffic.

        Args:
            traffic: all messages, in order.
            raw: whether the values stand in the messages as they are.
        """
        assert self.shared
        trained = [v for v in self.shared[0].values() if v.is_floating_point() and v.numel() > 200]
        control = Canaries(trained)
        found = set()
        for tensors in decoded(traffic, "up"):
            found |= set(control.found_among(tensors))
        assert len(found) >= len(trained) > 0
        if raw:
            data = b"".join(each.data for each in traffic if each.direction == "up")
            assert control.found_in(data) >= len(control)


def decoded(traffic: Iterable[Traffic], direction: str) -> list[State]:
    """Return the tensors that the receivers decode of the messages of one direction.

    A payload that cannot be decoded is left out; tests damage some.

    Args:
        traffic: all messages, in order.
        direction: ``up`` or ``down``.
    """
    held: dict[str, Mapping[str, Tensor]] = {}
    described: dict[str, Description] = {}
    rolls: dict[str, Roll] = {}
    found = []
    for each in traffic:
        rows = []
        for name, payload in _separated(each.payloads, rolls).items():
            read = _decoded(payload, held, described)
            if read is None:
                continue
            tensors, description = read
            reference = reference_hash(tensors)
            held[reference] = tensors
            if not name.startswith(FROZEN):
                rows.append(RollRow(name, description, reference, len(tensors)))
            if each.direction == direction:
                found.append(tensors)
        roll = Roll(tuple(rows))
        rolls[roll.digest] = roll
    return found


def _separated(payloads: Mapping[str, bytes], rolls: Mapping[str, Roll]) -> dict[str, bytes]:
    """Return the records of a message, where one payload may hold them all."""
    found = dict(payloads)
    if JOINT_RECORD in found:
        with suppress(FedParaError):
            found |= separate_payloads(found.pop(JOINT_RECORD), rolls=rolls)
    return found


def _decoded(
    payload: bytes,
    held: Mapping[str, Mapping[str, Tensor]],
    described: dict[str, Description],
) -> tuple[State, str] | None:
    """Decode a payload with what went before, and note its description for those to come."""
    try:
        header = peek_header(payload, descriptions=described)
        base = reference_from_header(header.extra, header.model, limit=LARGEST)
        known = held if base is None else {base.reference: base.tensors}
        tensors = decode_payload(
            payload, references=known, limit=LARGEST, descriptions=described
        ).tensors
    except FedParaError:
        return None
    description = Description.of(header.model, tensors)
    described[description.digest] = description
    return tensors, description.digest


@contextmanager
def kept_private() -> Iterator[KeptPrivate]:
    """Return a context in which everything is noted that a client of this process keeps."""
    found = KeptPrivate()
    keep, prepare = ClientState.keep_private, ClientRound.prepare_reply

    def keep_noted(self: ClientState, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        found.keep(spec, tensors)
        keep(self, spec, tensors)

    def prepare_noted(self: ClientRound, records: Any, **options: Any) -> Any:
        found.answer(records.values())
        return prepare(self, records, **options)

    ClientState.keep_private = keep_noted  # type: ignore[method-assign]
    ClientRound.prepare_reply = prepare_noted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        ClientState.keep_private = keep  # type: ignore[method-assign]
        ClientRound.prepare_reply = prepare  # type: ignore[method-assign]


def _distinct(values: Iterable[Tensor]) -> list[Tensor]:
    """Leave out tensors that occur again, such as those of a client that did not train."""
    found = {}
    for value in values:
        if value.is_floating_point():
            found[value.float().numpy().tobytes()] = value
    return list(found.values())
