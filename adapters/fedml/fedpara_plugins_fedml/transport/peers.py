"""One process's end of a FedML transport: nothing waits for ever, and nobody dies unnoticed.

FedML's communication managers send and receive, as they are. Around them: a thread that receives,
a thread for each peer that sends (a peer that hangs holds up nobody else), and a thread that tells
the peers that we live and watches when they were last heard of. What has to be decided comes as an
`Event` to the main thread, which trains and aggregates as in FedML.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fedml.core.distributed.communication.message import Message
from fedml.core.distributed.fedml_comm_manager import FedMLCommManager

from fedpara_plugins import FedParaError
from fedpara_plugins_fedml.transport.blocking_queue import make_patient
from fedpara_plugins_fedml.transport.protocol import (
    BROKEN,
    CHECK,
    FAILED,
    GONE,
    HELLO,
    NAMES,
    PULSE,
    READY,
    STOCK,
    Event,
)
from fedpara_plugins_fedml.transport.shutdown import close_transport, end_process
from fedpara_plugins_fedml.transport.wire import Handlers, Letter, kind_of, reason_of

__all__ = ["Post"]

log = logging.getLogger("fedpara.fedml")

UNHEEDED = 10.0
"""Seconds that the main thread of a client has to notice that the run has ended."""


class Post(FedMLCommManager):  # type: ignore[misc]
    """Sends and receives for one process.

    Args:
        args: FedML's.
        rank: of this process for the transport.
        size: what FedML's own manager passes to it.
        own: the id under which the others know this process; 0 is the server.
        peers: the ids of those that it talks to.
        timeout: seconds of silence after which a peer counts as gone.
        patience: seconds that the transport may take to come up.

    Attributes:
        since: the monotonic time at which the transport was up.
    """

    def __init__(
        self,
        args: Any,
        *,
        rank: int,
        size: int,
        own: int,
        peers: Sequence[int],
        timeout: float,
        patience: float,
    ) -> None:
        self.own = own
        self.peers = tuple(peers)
        self.timeout = timeout
        self._inbox: queue.Queue[Event] = queue.Queue()
        self._outboxes: dict[int, queue.Queue[Letter | None]] = {p: queue.Queue() for p in peers}
        self._seen: dict[int, float] = {}
        self._heard: set[int] = set()
        self._ours: set[int] = set()
        self._gone: set[int] = set()
        self._taken: dict[int, float] = {}
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._unheeded: threading.Timer | None = None
        watch = threading.Timer(patience, self._not_up, [patience])
        watch.daemon = True
        watch.start()  # some transports wait in here for all parties
        super().__init__(args, args.comm, rank, size, args.backend)
        watch.cancel()
        self.since = time.monotonic()
        make_patient(self.com_manager)
        self._threads = [
            self._started(self._receive, "receive"),
            self._started(self._beat, "pulse"),
        ]
        self._threads += [self._started(self._deliver, f"to-{peer}", peer) for peer in peers]

    # For the main thread

    def send(self, peer: int, kind: int, data: bytes | None = None, **fields: Any) -> None:
        """Queue a message; an `Event` of kind `GONE` says if it cannot be delivered."""
        self._outboxes[peer].put(Letter(kind, data, fields))

    def next(self, seconds: float | None = None) -> Event | None:
        """The next event; None if none comes in time.

        Raises:
            FedParaError: the transport of this process has broken down.
        """
        try:
            event = self._inbox.get(timeout=seconds)
        except queue.Empty:
            return None
        if self._unheeded is not None and event.kind in (GONE, FAILED):
            self._unheeded.cancel()
        if event.kind == BROKEN:
            raise FedParaError(f"fedpara: the transport has ended: {event.text('reason')}")
        return event

    def unanswered(self, peer: int) -> float:
        """Seconds since a peer that was never heard took our first message; 0 if it took none.

        A broker takes messages for anyone, so that nothing is known with one.
        """
        if peer in self._seen or peer not in self._taken or self.backend.startswith("MQTT"):
            return 0.0
        return time.monotonic() - self._taken[peer]

    def unheard(self) -> set[int]:
        """The peers that have never said anything."""
        return set(self.peers) - self._heard

    def gone(self) -> set[int]:
        """The peers of which nothing is expected any more."""
        return set(self._gone)

    def without_plugin(self) -> set[int]:
        """The peers that have spoken, and never as the plugin does."""
        return self._heard - self._ours

    def forget(self, peer: int) -> None:
        """Deliver nothing more to a peer and expect nothing of it, until it is heard again."""
        self._gone.add(peer)
        self._seen.pop(peer, None)

    def close(self, *, orderly: bool) -> bool:
        """End the transport.

        Args:
            orderly: whether all parties end now, so that a transport may wait for them.

        Returns:
            Whether it has ended; if not, only the end of the process will do.
        """
        for outbox in self._outboxes.values():
            outbox.put(None)
        deadline = time.monotonic() + 5
        for thread in self._threads[2:]:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._ended.set()
        self._threads[1].join(2)
        closed = close_transport(self.com_manager, self.backend, orderly=orderly)
        self._threads[0].join(5)
        return closed and not self._threads[0].is_alive()

    # FedML's side

    def register_message_receive_handlers(self) -> None:
        """All that may come, ours and FedML's own."""
        self.register_message_receive_handler(READY, lambda message: self._ready.set())
        for kind in (*STOCK, *NAMES):
            self.register_message_receive_handler(kind, self._received)
        # Whatever else comes: an unknown type ends FedML's loop.
        known: Mapping[Any, Any] = self.message_handler_dict
        self.message_handler_dict: Any = Handlers(known, self._received)

    def _received(self, message: Any) -> None:
        """Runs in FedML's loop, which an exception would end without a word."""
        try:
            fields = message.get_params()
            peer, kind = int(message.get_sender_id()), kind_of(message.get_type(), fields)
        except (TypeError, ValueError, OverflowError) as error:
            log.warning("fedpara: a message without sender or type is dropped: %s", error)
            return
        if peer not in self._outboxes:
            log.warning(
                "fedpara: a message of type %d from unknown party %d is dropped", kind, peer
            )
            return
        self._seen[peer] = time.monotonic()
        self._heard.add(peer)
        if kind not in STOCK:
            self._ours.add(peer)
        if self._ended.is_set():
            return
        if peer in self._gone:
            self._gone.discard(peer)
            if kind != HELLO:  # it was only slow
                self._inbox.put(Event(HELLO, peer, fields={"session": "back"}))
        if kind == PULSE:
            return
        data = fields.get(Message.MSG_ARG_KEY_MODEL_PARAMS)
        if kind == FAILED:
            fields = {"reason": reason_of(message)}
            self._heed(str(fields.get("reason")))
        self._inbox.put(Event(kind, peer, data, fields))

    # Threads

    def _started(self, target: Any, name: str, *args: Any) -> threading.Thread:
        thread = threading.Thread(target=target, name=f"fedpara-{name}", args=args, daemon=True)
        thread.start()
        return thread

    def _receive(self) -> None:
        try:
            self.run()
        except Exception as error:
            if not self._ended.is_set():
                log.exception("fedpara: FedML's receiving loop has ended")
                reason = f"{type(error).__name__}: {error}"
                self._inbox.put(Event(BROKEN, self.own, fields={"reason": reason}))

    def _deliver(self, peer: int) -> None:
        self._ready.wait()
        while (letter := self._outboxes[peer].get()) is not None:
            self._try_to_send(peer, letter)

    def _try_to_send(self, peer: int, letter: Letter) -> None:
        """Once for what is said again anyway; else until the peer counts as gone."""
        deadline = time.monotonic() + self.timeout
        while peer not in self._gone or letter.kind in (PULSE, FAILED):
            message = letter.message(self.own, peer, plain=peer not in self._ours)
            first = peer not in self._taken
            self._taken.setdefault(peer, time.monotonic())  # it may also take it and never return
            try:
                self.send_message(message)
                return
            except Exception as error:
                if first:
                    self._taken.pop(peer, None)
                if letter.kind in (PULSE, HELLO, CHECK, FAILED) or self._ended.is_set():
                    return
                if time.monotonic() > deadline:
                    self._report_gone(peer, f"a {NAMES[letter.kind]} cannot be sent to it: {error}")
                    return
            time.sleep(1)

    def _beat(self) -> None:
        """Say that we live, and see who does not."""
        interval, last = self.timeout / 8, time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            if now - last > self.timeout / 2:  # it is we who were asleep
                self._seen = dict.fromkeys(self._seen, now)
            last = now
            for peer in self.peers:
                if self._outboxes[peer].empty() and peer in self._ours:
                    self.send(peer, PULSE)
                if now - self._seen.get(peer, now) > self.timeout:
                    self._report_gone(peer, f"nothing was heard of it for {self.timeout:.0f} s")

    def _report_gone(self, peer: int, reason: str) -> None:
        if peer in self._gone:
            return
        self.forget(peer)
        if self.own != 0:
            self._heed(f"the server is gone: {reason}")
        self._inbox.put(Event(GONE, peer, fields={"reason": reason}))

    def _heed(self, reason: str) -> None:
        """End a client whose main thread is busy (it trains) and will not hear of the end."""
        if self.own == 0 or self._unheeded is not None:
            return
        text = f"the run has ended, and this client still trained: {reason}"
        self._unheeded = threading.Timer(UNHEEDED, end_process, [text])
        self._unheeded.daemon = True
        self._unheeded.start()

    def _not_up(self, seconds: float) -> None:
        end_process(
            f"the transport {self.backend} is not up after {seconds:.0f} s: it waits for a party "
            f"that has not been started, or cannot be reached (process {os.getpid()})"
        )
