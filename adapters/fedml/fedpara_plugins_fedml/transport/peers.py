"""One process's end of a FedML transport, where nothing waits for ever and no failure is missed.

FedML's communication managers send and receive. Around them there is a thread that receives, a
thread for each peer that sends (a peer that hangs does not delay the others), and a thread that
sends heartbeats and checks when the peers were last heard. Messages and failures come as an `Event`
to the main thread, which trains and aggregates as in FedML.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from fedpara_plugins import FedParaError
from fedpara_plugins.support import shortened
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.seams import MODEL_KEY, FedMLCommManager, guard_listeners
from fedpara_plugins_fedml.transport.blocking_queue import use_blocking_queue
from fedpara_plugins_fedml.transport.peer_status import PeerStatus
from fedpara_plugins_fedml.transport.protocol import (
    BROKEN,
    CHECK,
    FAILED,
    FEDML_FINISH,
    FEDML_TYPES,
    GONE,
    HEARTBEAT,
    HELLO,
    READY,
    TYPE_NAMES,
    UNREADABLE,
    Event,
)
from fedpara_plugins_fedml.transport.shutdown import close_transport, end_process
from fedpara_plugins_fedml.transport.wire import (
    OutgoingMessage,
    failure_reason,
    message_type,
    sender_of,
)

__all__ = ["Endpoint"]

SENT_ONCE = (HEARTBEAT, HELLO, CHECK, FAILED, FEDML_FINISH)
"""Messages that are not sent again after an error: they are repeated, or nobody may be there."""

EXIT_DELAY = 10.0
"""Seconds that a client's main thread has to react to the end of the run."""


class Endpoint(FedMLCommManager):  # type: ignore[misc]
    """Sends and receives for one process.

    Args:
        args: FedML's.
        rank: of this process for the transport.
        size: that FedML's own manager passes to the transport.
        own: the id under which the others know this process; 0 is the server.
        peers: the ids of the processes that it exchanges messages with.
        timeout: seconds of silence after which a peer counts as gone.
        start_timeout: seconds within which the transport must be up.

    Attributes:
        status: what is known about the peers.
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
        start_timeout: float,
    ) -> None:
        self.own = own
        self.peers = tuple(peers)
        self.timeout = timeout
        self.status = PeerStatus(peers)
        self._events: queue.Queue[Event] = queue.Queue()
        self._outgoing: dict[int, queue.Queue[OutgoingMessage | None]] = {
            peer: queue.Queue() for peer in peers
        }
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._exit_timer: threading.Timer | None = None
        watch = threading.Timer(start_timeout, self._end_not_up, [start_timeout])
        watch.daemon = True
        watch.start()  # some transports wait in this constructor for all processes
        super().__init__(args, args.comm, rank, size, args.backend)
        watch.cancel()
        self.since = time.monotonic()
        use_blocking_queue(self.com_manager, self._accepts)
        guard_listeners(self.com_manager, log)
        self._receiver = self._started(self._receive, "receive")
        self._monitor = self._started(self._watch_peers, "heartbeat")
        self._senders = [self._started(self._deliver, f"to-{peer}", peer) for peer in peers]

    # For the main thread

    def send(self, peer: int, kind: int, data: bytes | None = None, **fields: Any) -> None:
        """Queue a message; an `Event` of kind `GONE` says if it cannot be delivered."""
        self._outgoing[peer].put(OutgoingMessage(kind, data, fields))

    def next(self, seconds: float | None = None) -> Event | None:
        """Return the next event; None if none comes in time.

        Raises:
            FedParaError: if the transport of this process has failed.
        """
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if self._exit_timer is not None and event.kind in (GONE, FAILED):
            self._exit_timer.cancel()
        if event.kind == BROKEN:
            raise FedParaError(f"fedpara: the transport has ended: {event.text('reason')}")
        return event

    def unanswered_for(self, peer: int) -> float:
        """Return the seconds since a peer that was never heard took the first message.

        The result is 0 if the peer took none, and with a broker, which takes messages for anyone.
        """
        return 0.0 if self.backend.startswith("MQTT") else self.status.unanswered_for(peer)

    def close(self, *, orderly: bool) -> bool:
        """End the transport.

        Args:
            orderly: whether all processes end now, so that a transport may wait for them.

        Returns:
            Whether it has ended; if not, only the end of the process helps.
        """
        for waiting in self._outgoing.values():
            waiting.put(None)
        deadline = time.monotonic() + 5
        for thread in self._senders:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._ended.set()
        self._monitor.join(2)
        closed = close_transport(self.com_manager, self.backend, orderly=orderly)
        self._receiver.join(5)
        return closed and not self._receiver.is_alive()

    # FedML's interface

    def register_message_receive_handlers(self) -> None:
        """Register nothing: `receive_message` takes all messages."""

    def receive_message(self, msg_type: Any, msg_params: Any) -> None:
        """Handle a message in FedML's loop, which an exception would end without a trace.

        FedML's own method raises for a type without a handler, and for a sender that is text.

        Args:
            msg_type: the type, as it was received.
            msg_params: FedML's message.
        """
        if type(msg_type) is int and msg_type == READY:
            self._ready.set()
        else:
            self._received(msg_params)

    def _accepts(self, entry: Any) -> bool:
        """Return whether FedML's loop can read an entry of its queue, and it is a peer's."""
        return sender_of(entry) in self._outgoing

    def _received(self, message: Any) -> None:
        """Pass a message on to the main thread; whatever it is, it ends nothing here."""
        try:
            peer = int(message.get_sender_id())
        except Exception as error:
            log.warning("fedpara: a message without a sender is dropped: %s", error)
            return
        if peer not in self._outgoing:
            log.warning("fedpara: a message of the unknown process %d is dropped", peer)
            return
        try:
            fields = dict(message.get_params())
            kind = message_type(message.get_type(), fields)
        except Exception as error:
            kind, reason = UNREADABLE, f"a message of no known type ({shortened(str(error), 80)})"
            fields = {"reason": reason}
        self.status.heard(peer, with_plugin=kind not in (*FEDML_TYPES, UNREADABLE))
        if self._ended.is_set():
            return
        if self.status.is_gone(peer):
            self.status.mark_back(peer)
            if kind not in (HELLO, UNREADABLE, *FEDML_TYPES):  # the peer was only slow
                self._events.put(Event(HELLO, peer, fields={"session": "back"}))
        if kind == HEARTBEAT:
            return
        data = fields.get(MODEL_KEY)
        if kind == FAILED:
            fields = {"reason": failure_reason(message)}
            self._schedule_exit(str(fields.get("reason")))
        self._events.put(Event(kind, peer, data, fields))

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
                self._events.put(Event(BROKEN, self.own, fields={"reason": reason}))

    def _deliver(self, peer: int) -> None:
        self._ready.wait()
        while (message := self._outgoing[peer].get()) is not None:
            self._try_to_send(peer, message)

    def _try_to_send(self, peer: int, outgoing: OutgoingMessage) -> None:
        """Send once what is repeated anyway; send other messages until the peer counts as gone."""
        deadline = time.monotonic() + self.timeout
        while not self.status.is_gone(peer) or outgoing.kind in (HEARTBEAT, FAILED):
            message = outgoing.to_fedml(self.own, peer, plain=not self.status.has_plugin(peer))
            # Recorded before: a transport may take the message and never return.
            first = self.status.sending(peer)
            try:
                self.send_message(message)
                return
            except Exception as error:
                if first:
                    self.status.not_sent(peer)
                if outgoing.kind in SENT_ONCE or self._ended.is_set():
                    return
                if time.monotonic() > deadline:
                    name = TYPE_NAMES[outgoing.kind]
                    self._report_gone(peer, f"a {name} cannot be sent to it: {error}")
                    return
            time.sleep(1)

    def _watch_peers(self) -> None:
        """Send heartbeats, and report peers that have been silent for too long."""
        interval, last = self.timeout / 8, time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            if now - last > self.timeout / 2:  # this process itself was suspended
                self.status.restart_clocks(now)
            last = now
            for peer in self.peers:
                if self._outgoing[peer].empty() and self.status.has_plugin(peer):
                    self.send(peer, HEARTBEAT)
                if self.status.silent_for(peer, now) > self.timeout:
                    self._report_gone(peer, f"it has been silent for {self.timeout:.0f} s")

    def _report_gone(self, peer: int, reason: str) -> None:
        if self.status.is_gone(peer):
            return
        self.status.mark_gone(peer)
        if self.own != 0:
            self._schedule_exit(f"the server is gone: {reason}")
        self._events.put(Event(GONE, peer, fields={"reason": reason}))

    def _schedule_exit(self, reason: str) -> None:
        """End this client in a while, unless its main thread, which may be training, reacts."""
        if self.own == 0 or self._exit_timer is not None:
            return
        text = f"the run has ended, and this client still trained: {reason}"
        self._exit_timer = threading.Timer(EXIT_DELAY, end_process, [text])
        self._exit_timer.daemon = True
        self._exit_timer.start()

    def _end_not_up(self, seconds: float) -> None:
        end_process(
            f"the transport {self.backend} is not up after {seconds:.0f} s: it waits for a "
            f"process that has not been started, or cannot be reached (process {os.getpid()})"
        )
