"""The server's process: rounds over a transport, with clients that may fail in any way."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

from fedpara_plugins import FedParaError
from fedpara_plugins_fedml.engine.evaluation import ServerEvaluation
from fedpara_plugins_fedml.engine.server import ServerEngine
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.modes.placement import SiloPlacement
from fedpara_plugins_fedml.modes.roster import Roster
from fedpara_plugins_fedml.modes.run_end import announce_failure, wait_for_byes
from fedpara_plugins_fedml.seams import mlops, server_status_running
from fedpara_plugins_fedml.transport.peers import Endpoint
from fedpara_plugins_fedml.transport.protocol import (
    BYE,
    CHECK,
    CLOSE,
    FAILED,
    FEDML_FINISH,
    FEDML_TYPES,
    FINISH,
    GONE,
    HELLO,
    REPLY,
    TASK,
    UNREADABLE,
    WELCOME,
    Event,
)

__all__ = ["ServerManager"]

TRIES = 2
"""Number of times that a client gets a round's model: again if it lacks the reference of it."""

MOST_RESENT = 5
"""Number of times that a process may come back in a round, and is sent its models again."""

NOT_A_CLIENTS = (WELCOME, TASK, FINISH, CLOSE, UNREADABLE)
"""Messages that no client sends; one in the place of a reply counts as one that is of no use."""

CHECK_INTERVAL = 5.0
"""Seconds between the questions of a waiting server to clients that it has never heard."""


class ServerManager:
    """Runs all rounds, and ends the run of all processes, in success and in failure.

    Args:
        args: FedML's.
        endpoint: to the clients.
        engine: the server's engine.
        placement: of silos.
        evaluation: after each round.
        start_timeout: seconds within which all clients must come.
    """

    def __init__(
        self,
        args: Any,
        endpoint: Endpoint,
        engine: ServerEngine,
        placement: SiloPlacement,
        evaluation: ServerEvaluation,
        start_timeout: float,
    ) -> None:
        self._args = args
        self._endpoint = endpoint
        self._engine = engine
        self._placement = placement
        self._evaluation = evaluation
        self._start_timeout = start_timeout
        self._roster = Roster(endpoint.peers, self._needed(engine.settings.min_clients))
        self._waiting: dict[int, int] = {}  # silo: process
        self._tries: dict[int, int] = {}
        self._resent: Counter[int] = Counter()  # process: how often it came back in this round
        self._late: Counter[int] = Counter()  # process: tasks that it still works on

    def _needed(self, min_clients: int) -> int:
        """Return the number of processes below which the run ends; replies are counted apart."""
        if self._placement.movable:
            return 1  # others train the silos of one that is out
        return min(max(min_clients, 1), len(self._endpoint.peers))

    def run(self) -> None:
        """Run all rounds.

        Raises:
            FedParaError: if the run has failed; every client has been sent the reason. Or if it is
                complete, and its checkpoint could not be written.
        """
        try:
            self._gather_clients()
            server_status_running()
            mlops.log_round_info(self._args.comm_round, -1)
            while self._engine.round < self._args.comm_round:
                self._round()
            self._engine.save_checkpoint()
            self._finish()
            mlops.log_aggregation_finished_status()
        except BaseException as error:
            announce_failure(self._endpoint, self._endpoint.peers, error)
            raise
        finally:
            self._engine.close()
        self._engine.raise_failure()

    # Which clients are there

    def _gather_clients(self) -> None:
        """Wait for all clients; at the deadline, go on without those that have not come."""
        deadline = time.monotonic() + self._start_timeout
        asked = -math.inf  # at once, as FedML's own server does
        while self._roster.awaited:
            if time.monotonic() > asked + CHECK_INTERVAL:
                asked = time.monotonic()
                for peer in self._endpoint.status.unheard():
                    self._endpoint.send(peer, CHECK)
            seconds = max(0.01, min(CHECK_INTERVAL, deadline - time.monotonic()))
            event = self._endpoint.next(seconds)
            if event is not None:
                self._handle(event)
            if time.monotonic() >= deadline:  # also while others send without end
                limit = f"{self._start_timeout:.0f} s (fedpara_start_timeout)"
                for peer in self._roster.awaited:
                    self._roster.leave_out(peer, f"has not come within {limit}")

    def _handle(self, event: Event) -> None:
        """Handle an event that may come at any time."""
        if event.kind == HELLO:
            self._handle_hello(event)
        elif event.kind == GONE:
            self._lose(event.peer, f"is gone: {event.text('reason')}")
        elif event.kind == FAILED:
            self._lose(event.peer, f"has failed: {event.text('reason')}")
        elif event.kind == BYE:
            self._endpoint.send(event.peer, CLOSE)
            self._lose(event.peer, "has left the run")
        elif event.kind in FEDML_TYPES:
            self._turn_away(
                event.peer,
                f"runs without the plugin (it sent FedML's own message {event.kind}), this server "
                f"with it. Give both sides the same fedpara_* keys and the same runner",
                without_plugin=True,
            )
        else:
            log.info("fedpara: a late message of client %d is dropped", event.peer)

    def _handle_hello(self, event: Event) -> None:
        peer = event.peer
        if error := event.text("error"):
            self._turn_away(peer, f"cannot take part: {error}")
            return
        back = self._roster.has_come(peer, event.text("session"))
        self._endpoint.send(peer, WELCOME)
        if back:
            log.warning("fedpara: client %d is back", peer)
            del self._late[peer]
            self._resent[peer] += 1
            if self._resent[peer] > MOST_RESENT:
                self._leave_out(peer, f"it has come back {self._resent[peer]} times in this round")
            for silo in self._awaited_from(peer):
                self._send_task(silo, peer)

    def _turn_away(self, peer: int, reason: str, *, without_plugin: bool = False) -> None:
        """Leave out a process that cannot take part, and send it the reason, by which it ends.

        Under ``mpirun`` its end would be that of all others, so it waits for the end of the run.
        """
        if self._endpoint.backend != "MPI":
            self._endpoint.send(peer, FAILED, reason=f"client {peer} {reason}")
        elif not without_plugin:
            self._endpoint.send(peer, WELCOME)
        self._lose(peer, reason, misconfigured=True, without_plugin=without_plugin)

    def _lose(self, peer: int, reason: str, **kind: bool) -> None:
        """Go on without a process, as long as enough are left."""
        if self._roster.leave_out(peer, reason, **kind):
            self._leave_out(peer, f"client {peer} {reason}")

    def _awaited_from(self, peer: int) -> list[int]:
        return [silo for silo, process in self._waiting.items() if process == peer]

    # A round

    def _round(self) -> None:
        number = self._engine.round
        silos = self._placement.sample(number)
        self._waiting = self._placement.assign(silos, self._endpoint.peers, self._roster.here)
        self._tries = dict.fromkeys(silos, 0)
        self._resent.clear()
        self._engine.begin([str(silo) for silo in silos])
        mlops.event("server.wait", event_started=True, event_value=str(number))
        for silo, peer in list(self._waiting.items()):
            self._send_task(silo, peer)
        self._collect()
        mlops.event("server.wait", event_started=False, event_value=str(number))
        mlops.event("server.agg_and_eval", event_started=True, event_value=str(number))
        self._engine.end()
        self._evaluation.after(number, silos)
        mlops.event("server.agg_and_eval", event_started=False, event_value=str(number))
        mlops.log_round_info(self._args.comm_round, number)

    def _collect(self) -> None:
        """Take replies until none is awaited, or the time of the round is over."""
        limit = self._engine.settings.round_timeout
        deadline = time.monotonic() + limit if limit else math.inf
        while self._waiting:
            left = deadline - time.monotonic()
            event = self._endpoint.next(None if left == math.inf else max(0.0, left))
            if event is not None:
                self._handle_in_round(event)
            if time.monotonic() >= deadline:
                for silo, peer in self._waiting.items():
                    self._late[peer] += 1
                    text = f"client {peer} has not answered within {limit:.0f} s"
                    self._engine.exclude(str(silo), f"{text} (fedpara_round_timeout)")
                self._waiting = {}

    def _handle_in_round(self, event: Event) -> None:
        peer, silo = event.peer, event.number("silo")
        if event.kind == REPLY and self._drop_late(peer):
            return
        if event.kind == REPLY and self._waiting.get(silo) == peer:
            self._handle_reply(silo, event)
        elif event.kind == REPLY:
            self._leave_out(peer, f"its reply names the silo {silo}, which it was not asked for")
        elif event.kind in NOT_A_CLIENTS or (event.kind in FEDML_TYPES and self._takes_part(peer)):
            self._leave_out(peer, f"it sends {event.name} in the place of a reply")
        else:
            self._handle(event)

    def _drop_late(self, peer: int) -> bool:
        """Drop an answer of an earlier round; return whether it is one."""
        if not self._late[peer]:
            return False
        self._late[peer] -= 1
        log.info("fedpara: a late answer of client %d is dropped", peer)
        return True

    def _takes_part(self, peer: int) -> bool:
        return peer in self._roster.here

    def _leave_out(self, peer: int, reason: str) -> None:
        """Leave out all silos of a process whose message cannot be that of one of them."""
        for silo in self._awaited_from(peer):
            del self._waiting[silo]
            self._engine.exclude(str(silo), reason)

    def _send_task(self, silo: int, peer: int) -> None:
        reason = self._roster.out.get(peer)
        if reason is None and self._late[peer]:
            reason = "still works on an earlier round"
        if reason is None:
            self._endpoint.send(peer, TASK, self._engine.message(str(silo)), silo=silo)
            return
        self._waiting.pop(silo)
        self._engine.exclude(str(silo), f"client {peer} {reason}")

    def _handle_reply(self, silo: int, event: Event) -> None:
        name = str(silo)
        mlops.event(
            "comm_c2s",
            event_started=False,
            event_value=str(self._engine.round - 1),
            event_edge_id=event.peer,
        )
        self._tries[silo] += 1
        try:
            if self._engine.receive(name, event.data):
                del self._waiting[silo]
                return
            if self._tries[silo] < TRIES:
                self._send_task(silo, event.peer)
                return
            raise FedParaError("it lost the reference of the message, twice")
        except FedParaError as error:
            self._waiting.pop(silo, None)
            self._engine.exclude(name, error)

    # The end

    def _finish(self) -> None:
        """Send all clients the last model, and wait until they have it."""
        self._engine.put_final()
        here, out = self._roster.here, self._roster.out
        for peer in here:
            if silos := self._placement.assigned_to(peer):
                final = self._engine.message(str(silos[0]), "evaluate")
                names = " ".join(map(str, silos))
                self._endpoint.send(peer, FINISH, final, silo=silos[0], silos=names)
            self._endpoint.send(peer, FINISH)
        plain = set(self._roster.without_plugin)
        for peer in out:
            self._endpoint.send(peer, FEDML_FINISH if peer in plain else FINISH)
        self._left = set(here)
        if self._endpoint.backend == "MPI":  # its processes can only end together
            self._left |= out.keys() - plain - self._endpoint.status.gone()
        end = time.monotonic() + self._start_timeout
        wait_for_byes(self._endpoint, self._left, self._handle_after_last_round, lambda: end)
        for peer, reason in out.items():
            log.warning("fedpara: the run has ended without client %d: it %s", peer, reason)

    def _handle_after_last_round(self, event: Event) -> None:
        if event.kind in (GONE, FAILED):
            log.warning("fedpara: client %d is gone after the last round", event.peer)
            self._left.discard(event.peer)
        elif event.kind == HELLO:  # it comes, or comes back, when all is done
            self._endpoint.send(event.peer, FINISH)
        elif event.kind == REPLY and not self._drop_late(event.peer):
            log.warning("fedpara: client %d cannot use the last model", event.peer)
