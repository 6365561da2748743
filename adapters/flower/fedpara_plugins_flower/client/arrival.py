"""The arrays of a message on their way to the app, decoded before it runs or when it reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import Array, ArrayRecord, Message

from fedpara_plugins import TooLargeError
from fedpara_plugins.exchange import FROZEN, JOINT_RECORD, ClientRound, ReceivedRecord
from fedpara_plugins.models import shapes_of
from fedpara_plugins_flower.messages import legacy_lists
from fedpara_plugins_flower.messages.deferred_record import DeferredRecord
from fedpara_plugins_flower.messages.records import to_record
from fedpara_plugins_flower.run import Run

__all__ = ["Arrival"]


class Arrival:
    """Decodes a message and gives its arrays to the app.

    A client takes no more than its own model allows. Once the app has built a model, the client
    remembers it, and decodes before the app runs. Until then it decodes what is small. A large
    message waits until the app reads an array, since apps build their model first; and so does a
    record without its frozen tensors, which are that model's.

    Args:
        message: its records of arrays are replaced.
        payloads: what they hold, by name.
        client_round: decodes.
        run: that the app runs in; it is told which models the message describes.
        check: called with what was decoded, before the app sees it.
    """

    def __init__(
        self,
        message: Message,
        payloads: Mapping[str, bytes],
        client_round: ClientRound,
        run: Run,
        check: Callable[[Mapping[str, ReceivedRecord]], None],
    ) -> None:
        self._message = message
        self._payloads = payloads
        self._round = client_round
        self._run = run
        self._check = check
        self._waits = False

    def place(self) -> None:
        """Put arrays into the message in the place of the payloads.

        Raises:
            LostReferenceError, ConfigError, PayloadError: see `ClientRound.receive`.
        """
        self._payloads = self._round.separate(self._payloads)
        if JOINT_RECORD in self._message.content.array_records:
            del self._message.content[JOINT_RECORD]
        try:
            self._receive()
        except TooLargeError:
            if self._run.own:
                raise
            self._waits = True
            self._run.plans = self._round.described_plans(self._payloads)
        for name in self._payloads:
            if name.startswith(FROZEN):
                del self._message.content[name]
                continue
            expected = legacy_lists.request_name(self._message, name)
            record: ArrayRecord
            if self._waits or self._round.received[name].spec.frozen:
                record = DeferredRecord(lambda name=name: self._arrays(name))  # type: ignore[misc]
            else:
                record = to_record(self._round.received[name].user_tensors)
                if expected != name:
                    record = legacy_lists.without_names(record)
            if expected != name:
                del self._message.content[name]
            self._message.content[expected] = record

    def received(self) -> Mapping[str, ReceivedRecord]:
        """Return what was received; decoded now if the app has not read it.

        Raises:
            LostReferenceError, ConfigError, PayloadError: see `ClientRound.receive`.
        """
        if self._waits:
            self._receive(unbounded=not self._run.own)
            self._waits = False
        return self._round.received

    def _arrays(self, name: str) -> Mapping[str, Array]:
        arrays = to_record(self.received()[name].user_tensors)
        legacy = legacy_lists.request_name(self._message, name) != name
        return legacy_lists.without_names(arrays) if legacy else arrays

    def _receive(self, *, unbounded: bool = False) -> None:
        received = self._round.receive(self._payloads, unbounded=unbounded)
        self._run.expected = self._run.plans = [part.spec for part in self._round.models]
        self._run.received = {
            frozenset(part.spec.keys): shapes_of(part.held.tensors) for part in self._round.models
        }
        self._run.standing_in = {
            name: part.private[name]
            for part in self._round.models
            if part.fresh
            for name, own in part.spec.own.items()
            if not own.onto
        }
        self._check(received)
