"""The server's process: rounds over a transport, with clients that may fail in any way."""

from __future__ import annotations

import math
import time
from typing import Any

from fedpara_plugins import ConfigError, FedParaError, MismatchError
from fedpara_plugins_fedml.engine.evaluation import ServerEvaluation
from fedpara_plugins_fedml.engine.server import ServerEngine
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.modes.placement import SiloPlacement
from fedpara_plugins_fedml.modes.run_end import announce_failure, wait_for_byes
from fedpara_plugins_fedml.seams import mlops, server_status_running
from fedpara_plugins_fedml.transport.peers import Endpoint
from fedpara_plugins_fedml.transport.protocol import (
    CHECK,
    FAILED,
    FEDML_TYPES,
    FINISH,
    GONE,
    HELLO,
    REPLY,
    TASK,
    WELCOME,
    Event,
)

__all__ = ["ServerManager"]

TRIES = 2
"""Number of times that a client gets a round's model: again if it lacks the reference of it."""

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
        self._sessions: dict[int, str] = {}
        self._alive: set[int] = set()
        self._waiting: dict[int, int] = {}  # silo: process
        self._tries: dict[int, int] = {}

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
        """Wait for all clients; at the deadline, go on if ``fedpara_min_clients`` are there."""
        deadline = time.monotonic() + self._start_timeout
        asked = -math.inf  # at once, as FedML's own server does
        while len(self._alive) < len(self._endpoint.peers):
            if time.monotonic() > asked + CHECK_INTERVAL:
                asked = time.monotonic()
                for peer in self._endpoint.status.unheard():
                    self._endpoint.send(peer, CHECK)
            seconds = max(0.01, min(CHECK_INTERVAL, deadline - time.monotonic()))
            event = self._endpoint.next(seconds)
            if event is not None:
                self._handle(event)
            elif time.monotonic() >= deadline:
                missing = sorted(set(self._endpoint.peers) - self._alive)
                self._check_alive(
                    f"clients {missing} have not come within {self._start_timeout:.0f} s "
                    f"(fedpara_start_timeout)"
                )
                log.warning("fedpara: the run begins without clients %s", missing)
                return

    def _handle(self, event: Event) -> None:
        """Handle an event that may come at any time."""
        if event.kind == HELLO:
            self._handle_hello(event)
        elif event.kind == GONE:
            self._handle_gone(event.peer, event.text("reason"))
        elif event.kind == FAILED:
            self._handle_failed(event.peer, event.text("reason"))
        elif event.kind in FEDML_TYPES:
            raise MismatchError(
                f"fedpara: client {event.peer} runs without the plugin (it sent FedML's own "
                f"message {event.kind}), this server with it. Give both sides the same fedpara_* "
                f"keys and the same runner"
            )
        else:
            log.info("fedpara: a late message of client %d is dropped", event.peer)

    def _handle_hello(self, event: Event) -> None:
        peer, session = event.peer, event.text("session")
        if error := event.text("error"):
            raise ConfigError(f"fedpara: client {peer}: {error}")
        known = self._sessions.get(peer)
        self._sessions[peer] = session
        self._alive.add(peer)
        self._endpoint.send(peer, WELCOME)
        if known not in (None, session):
            log.warning("fedpara: client %d is back", peer)
            for silo in self._awaited_from(peer):
                self._send_task(silo, peer)

    def _handle_gone(self, peer: int, reason: str) -> None:
        if peer not in self._alive:
            return
        self._alive.discard(peer)
        text = f"client {peer} is gone: {reason}"
        log.error("fedpara: %s", text)
        for silo in self._awaited_from(peer):
            del self._waiting[silo]
            self._engine.exclude(str(silo), text)
        self._check_alive(text)

    def _handle_failed(self, peer: int, reason: str) -> None:
        """End the run with a client's failure, unless the run can do without that process."""
        if not self._engine.settings.min_clients:
            raise FedParaError(f"fedpara: client {peer}: {reason}")
        self._handle_gone(peer, reason)

    def _awaited_from(self, peer: int) -> list[int]:
        return [silo for silo, process in self._waiting.items() if process == peer]

    def _check_alive(self, reason: str) -> None:
        needed = self._engine.settings.min_clients
        if not needed or len(self._alive) < needed:
            hint = f"fedpara_min_clients is {needed}" if needed else "fedpara_min_clients is unset"
            raise FedParaError(
                f"fedpara: {reason}. {len(self._alive)} of {len(self._endpoint.peers)} client "
                f"processes are left, and {hint}: the run ends"
            )

    # A round

    def _round(self) -> None:
        number = self._engine.round
        silos = self._placement.sample(number)
        self._waiting = self._placement.assign(silos, self._endpoint.peers)
        self._tries = dict.fromkeys(silos, 0)
        self._engine.begin([str(silo) for silo in silos])
        mlops.event("server.wait", event_started=True, event_value=str(number))
        for silo, peer in list(self._waiting.items()):
            self._send_task(silo, peer)
        while self._waiting:
            event = self._endpoint.next()
            assert event is not None  # without a time limit
            silo = event.number("silo")
            if event.kind == REPLY and self._waiting.get(silo) == event.peer:
                self._handle_reply(silo, event)
            elif event.kind == REPLY and silo not in silos:
                self._leave_out(event.peer, f"its reply names the silo {silo}, which is not asked")
            elif event.kind in FEDML_TYPES and event.peer in self._sessions:
                self._leave_out(event.peer, f"it sends FedML's own message {event.kind}")
            else:
                self._handle(event)
        mlops.event("server.wait", event_started=False, event_value=str(number))
        mlops.event("server.agg_and_eval", event_started=True, event_value=str(number))
        self._engine.end()
        self._evaluation.after(number, silos)
        mlops.event("server.agg_and_eval", event_started=False, event_value=str(number))
        mlops.log_round_info(self._args.comm_round, number)

    def _leave_out(self, peer: int, reason: str) -> None:
        """Leave out all silos of a process whose message cannot be that of one of them."""
        for silo in self._awaited_from(peer):
            del self._waiting[silo]
            self._engine.exclude(str(silo), reason)

    def _send_task(self, silo: int, peer: int) -> None:
        if peer not in self._alive:
            self._waiting.pop(silo)
            self._engine.exclude(str(silo), f"client process {peer} is gone")
            return
        self._endpoint.send(peer, TASK, self._engine.message(str(silo)), silo=silo)

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
        for peer in sorted(self._alive):
            if silos := self._placement.assigned_to(peer):
                final = self._engine.message(str(silos[0]), "evaluate")
                names = " ".join(map(str, silos))
                self._endpoint.send(peer, FINISH, final, silo=silos[0], silos=names)
            self._endpoint.send(peer, FINISH)
        wait_for_byes(self._endpoint, self._alive, self._handle_after_last_round, None)

    def _handle_after_last_round(self, event: Event) -> None:
        if event.kind == GONE:
            log.warning("fedpara: client %d is gone after the last round", event.peer)
            self._alive.discard(event.peer)
        elif event.kind == REPLY:
            log.warning("fedpara: client %d cannot use the last model", event.peer)
