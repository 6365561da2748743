"""The server's process: rounds over a transport, with clients that may fail in any way."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from fedml import mlops

from fedpara_plugins import ConfigError, FedParaError, MismatchError
from fedpara_plugins_fedml.engine.evaluation import Evaluation
from fedpara_plugins_fedml.engine.server import ServerEngine
from fedpara_plugins_fedml.modes.placement import Silos
from fedpara_plugins_fedml.modes.run_end import dismiss, part
from fedpara_plugins_fedml.transport.peers import Post
from fedpara_plugins_fedml.transport.protocol import (
    ANSWER,
    CHECK,
    FAILED,
    FINISH,
    GONE,
    HELLO,
    STOCK,
    TASK,
    WELCOME,
    Event,
)

__all__ = ["ServerManager"]

log = logging.getLogger("fedpara.fedml")

TRIES = 2
"""How often a client is sent a round's model: again if it lost what that was coded against."""

ASK_AGAIN = 5.0
"""Seconds after which a server that waits asks those that it has never heard."""


class ServerManager:
    """Runs all rounds and ends everybody's run, in success and in failure.

    Args:
        args: FedML's.
        post: to the clients.
        engine: the server's.
        silos: of the run.
        evaluation: after each round.
        start_timeout: seconds that all clients have to come.
    """

    def __init__(
        self,
        args: Any,
        post: Post,
        engine: ServerEngine,
        silos: Silos,
        evaluation: Evaluation,
        start_timeout: float,
    ) -> None:
        self._args = args
        self._post = post
        self._engine = engine
        self._silos = silos
        self._evaluation = evaluation
        self._start_timeout = start_timeout
        self._sessions: dict[int, str] = {}
        self._alive: set[int] = set()
        self._waiting: dict[int, int] = {}  # silo: process
        self._tries: dict[int, int] = {}

    def run(self) -> None:
        """All rounds.

        Raises:
            FedParaError: the run has failed; every client has been told why.
        """
        try:
            self._gather()
            mlops.log_aggregation_status(mlops.ServerConstants.MSG_MLOPS_SERVER_STATUS_RUNNING)
            mlops.log_round_info(self._args.comm_round, -1)
            while self._engine.round < self._args.comm_round:
                self._round()
            self._engine.save_checkpoint()
            self._finish()
            mlops.log_aggregation_finished_status()
        except BaseException as error:
            dismiss(self._post, self._post.peers, error)
            raise
        finally:
            self._engine.close()

    # Who is there

    def _gather(self) -> None:
        """Wait for all clients; for fewer if ``fedpara_min_clients`` says how many will do."""
        deadline = time.monotonic() + self._start_timeout
        asked = -math.inf  # at once, as FedML's own server does
        while len(self._alive) < len(self._post.peers):
            if time.monotonic() > asked + ASK_AGAIN:
                asked = time.monotonic()
                for peer in self._post.unheard():
                    self._post.send(peer, CHECK)
            event = self._post.next(max(0.01, min(ASK_AGAIN, deadline - time.monotonic())))
            if event is not None:
                self._handle(event)
            elif time.monotonic() >= deadline:
                missing = sorted(set(self._post.peers) - self._alive)
                self._check_alive(
                    f"clients {missing} have not come within {self._start_timeout:.0f} s "
                    f"(fedpara_start_timeout)"
                )
                log.warning("fedpara: the run begins without clients %s", missing)
                return

    def _handle(self, event: Event) -> None:
        """Whatever may come at any time."""
        if event.kind == HELLO:
            self._hello(event)
        elif event.kind == GONE:
            self._lost(event.peer, event.text("reason"))
        elif event.kind == FAILED:
            raise FedParaError(f"fedpara: client {event.peer}: {event.text('reason')}")
        elif event.kind in STOCK:
            raise MismatchError(
                f"fedpara: client {event.peer} runs without the plugin (it sent FedML's own "
                f"message {event.kind}), this server with it. Give both sides the same fedpara_* "
                f"keys and the same runner"
            )
        else:
            log.info("fedpara: a late message of client %d is dropped", event.peer)

    def _hello(self, event: Event) -> None:
        peer, session = event.peer, event.text("session")
        if error := event.text("error"):
            raise ConfigError(f"fedpara: client {peer}: {error}")
        known = self._sessions.get(peer)
        self._sessions[peer] = session
        self._alive.add(peer)
        self._post.send(peer, WELCOME)
        if known not in (None, session):
            log.warning("fedpara: client %d is back", peer)
            for silo in [silo for silo, home in self._waiting.items() if home == peer]:
                self._ask(silo, peer)

    def _lost(self, peer: int, reason: str) -> None:
        if peer not in self._alive:
            return
        self._alive.discard(peer)
        text = f"client {peer} is gone: {reason}"
        log.error("fedpara: %s", text)
        for silo in [silo for silo, home in self._waiting.items() if home == peer]:
            del self._waiting[silo]
            self._engine.exclude(str(silo), text)
        self._check_alive(text)

    def _check_alive(self, reason: str) -> None:
        needed = self._engine.settings.min_clients
        if not needed or len(self._alive) < needed:
            hint = f"fedpara_min_clients is {needed}" if needed else "fedpara_min_clients is unset"
            raise FedParaError(
                f"fedpara: {reason}. {len(self._alive)} of {len(self._post.peers)} client "
                f"processes are left, and {hint}: the run ends"
            )

    # A round

    def _round(self) -> None:
        number = self._engine.round
        silos = self._silos.of_round(number)
        self._waiting = self._silos.homes(silos, self._post.peers)
        self._tries = dict.fromkeys(silos, 0)
        self._engine.begin([str(silo) for silo in silos])
        mlops.event("server.wait", event_started=True, event_value=str(number))
        for silo, peer in list(self._waiting.items()):
            self._ask(silo, peer)
        while self._waiting:
            event = self._post.next()
            assert event is not None  # without a time limit
            if event.kind == ANSWER and self._waiting.get(event.number("silo")) == event.peer:
                self._answer(event.number("silo"), event)
            else:
                self._handle(event)
        mlops.event("server.wait", event_started=False, event_value=str(number))
        mlops.event("server.agg_and_eval", event_started=True, event_value=str(number))
        self._engine.end()
        self._evaluation.after(number, silos)
        mlops.event("server.agg_and_eval", event_started=False, event_value=str(number))
        mlops.log_round_info(self._args.comm_round, number)

    def _ask(self, silo: int, peer: int) -> None:
        if peer not in self._alive:
            self._waiting.pop(silo)
            self._engine.exclude(str(silo), f"client process {peer} is gone")
            return
        self._post.send(peer, TASK, self._engine.message(str(silo)), silo=silo)

    def _answer(self, silo: int, event: Event) -> None:
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
                self._ask(silo, event.peer)
                return
            raise FedParaError("it lost what the message was coded against, twice")
        except ConfigError:
            raise
        except FedParaError as error:
            self._waiting.pop(silo, None)
            self._engine.exclude(name, error)

    # The end

    def _finish(self) -> None:
        """Send everybody the last model, and wait until all have it."""
        self._engine.put_final()
        for peer in sorted(self._alive):
            if silos := self._silos.of_process(peer):
                final = self._engine.message(str(silos[0]), "evaluate")
                names = " ".join(map(str, silos))
                self._post.send(peer, FINISH, final, silo=silos[0], silos=names)
            self._post.send(peer, FINISH)
        part(self._post, self._alive, self._last_words, None)

    def _last_words(self, event: Event) -> None:
        if event.kind == GONE:
            log.warning("fedpara: client %d is gone after the last round", event.peer)
            self._alive.discard(event.peer)
        elif event.kind == ANSWER:
            log.warning("fedpara: client %d has no use for the last model", event.peer)
