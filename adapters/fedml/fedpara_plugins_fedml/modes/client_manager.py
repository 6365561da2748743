"""A client's process: it trains what it is sent, and ends when the server says so or is gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NoReturn
from uuid import uuid4

from fedml import mlops

from fedpara_plugins import FedParaError, MismatchError
from fedpara_plugins_fedml.engine.client import ClientEngine
from fedpara_plugins_fedml.transport.peers import Post
from fedpara_plugins_fedml.transport.protocol import (
    ANSWER,
    BYE,
    CHECK,
    CLOSE,
    FAILED,
    FINISH,
    GONE,
    HELLO,
    STOCK,
    TASK,
    WELCOME,
    Event,
)

__all__ = ["TESTS", "ClientManager", "introduce"]

log = logging.getLogger("fedpara.fedml")

SERVER = 0
FAREWELL = 15.0
"""Seconds that the server has to answer a BYE."""

SILENCE = 3.0
"""Seconds without a word from FedML's server after which it has no more to say."""

FIRST_WORD = 10.0
"""Seconds that a server on TRPC has to speak first, as FedML's own and ours do when they are ready.

FedML's own server takes messages from a thread that runs before the rest of it is ready, and that
ends with an error if the word that a client is online comes too soon.
"""

AGAIN, SELDOM = 2.0, 10.0
"""Seconds until a client says again that it is there; the second to a server that has spoken, over
a transport that loses nothing: FedML's own would send everybody a model once more."""

WORTH_A_WORD = 10.0
"""Seconds of waiting after which a client says what it waits for."""

TESTS = ("no", "before_aggregation", "after_aggregation", "both")


class ClientManager:
    """Runs one client process.

    Args:
        args: FedML's.
        post: to the server.
        engine: the client's.
        dataset: FedML's eight entries.
        start_timeout: seconds that the server has to answer.
    """

    def __init__(
        self,
        args: Any,
        post: Post,
        engine: ClientEngine,
        dataset: Sequence[Any],
        start_timeout: float,
    ) -> None:
        self._args = args
        self._post = post
        self._engine = engine
        (_, _, _, _, self._sizes, self._train, self._test, _) = dataset
        self._start_timeout = start_timeout
        self._tests = str(getattr(args, "test_on_clients", None) or "no")

    def run(self) -> None:
        """Serve until the run ends.

        Raises:
            FedParaError: it has failed; the message is the server's reason, or why it is gone.
        """
        mlops.log_sys_perf(self._args)
        event: Event | None = introduce(self._post, self._start_timeout)
        mlops.log_training_status(mlops.ClientConstants.MSG_MLOPS_CLIENT_STATUS_TRAINING)
        while not self._dealt_with(event):
            event = self._post.next()
        mlops.stop_sys_perf()
        mlops.log_training_finished_status()
        _say_goodbye(self._post)

    def _dealt_with(self, event: Event | None) -> bool:
        """Whether that was the end."""
        if event is None or event.kind in (WELCOME, CLOSE):
            return False
        if event.kind == TASK:
            self._trained(event)
        elif event.kind == FINISH:
            if event.data is None:
                return True
            self._finished(event)
        else:
            _refuse(self._post, event)
        return False

    def _trained(self, event: Event) -> None:
        silo = event.number("silo")
        number = str(getattr(self._args, "round_idx", 0))
        mlops.event("train", event_started=True, event_value=number)
        reply = self._engine.train(
            str(silo),
            event.data,
            self._train.get(silo),
            self._test.get(silo),
            self._sizes.get(silo, 0),
            loaded=lambda: self._tested(silo, "after_aggregation"),
        )
        mlops.event("train", event_started=False, event_value=number)
        mlops.event("comm_c2s", event_started=True, event_value=number)
        self._post.send(SERVER, ANSWER, reply, silo=silo)
        self._tested(silo, "before_aggregation")

    def _tested(self, silo: int, when: str) -> None:
        """Test on the silo's data if the project asks for it; an error there costs no answer."""
        first = getattr(self._args, "round_idx", 0) == 0
        if self._tests not in (when, "both") or (when == "after_aggregation" and first):
            return
        try:
            self._engine.test(self._test.get(silo))
        except Exception:
            log.exception("fedpara: the test of data silo %d has failed", silo)

    def _finished(self, event: Event) -> None:
        silo = event.number("silo")
        try:
            state = self._engine.take_final(str(silo), event.data)
            for name in event.text("silos").split():
                self._engine.export(name, state)
        except FedParaError as error:
            log.warning("fedpara: the last model cannot be used: %s", error)
            self._post.send(SERVER, ANSWER, None, silo=silo)


def introduce(post: Post, seconds: float, error: str = "") -> Event:
    """Say hello until the server answers; the first event of the run.

    Args:
        post: to the server.
        seconds: how long the server may take.
        error: why this client cannot take part.

    Raises:
        FedParaError: it does not answer.
        MismatchError: it seems to run without the plugin.
    """
    start, session = time.monotonic(), uuid4().hex
    end, told = start + seconds, False
    reliable = post.backend == "TRPC"
    speak = start + (FIRST_WORD if reliable else 0)
    while time.monotonic() < end:
        spoken = SERVER not in post.unheard()
        if spoken or time.monotonic() >= speak:
            post.send(SERVER, HELLO, session=session, error=error)
            event = post.next(SELDOM if spoken and reliable else AGAIN)
        else:
            event = post.next(0.1)
        if event is not None and event.kind != CHECK:
            return event
        if event is not None:  # FedML's server: it speaks to all clients when the last has come
            end = min(end, time.monotonic() + post.timeout)
        if post.unanswered(SERVER) > post.timeout:
            _mismatch(
                post,
                f"the server takes messages and does not answer for {post.timeout:.0f} s: it runs "
                f"without the plugin, or has ended; see its log",
            )
        if time.monotonic() > start + WORTH_A_WORD and not told:
            told = True
            log.info(
                "fedpara: waiting for the server, up to %.0f s (fedpara_start_timeout)", seconds
            )
    if post.without_plugin():
        return Event(CHECK, SERVER)
    raise FedParaError(
        f"fedpara: the server has not answered within {seconds:.0f} s (fedpara_start_timeout): "
        f"is it running, and with the plugin?"
    )


def _refuse(post: Post, event: Event) -> None:
    """Raise for what ends the run; what is none of ours is dropped."""
    if event.kind == FAILED:
        _say_goodbye(post)
        raise FedParaError(f"fedpara: the server ended the run: {event.text('reason')}")
    if event.kind == GONE:
        raise FedParaError(f"fedpara: the server is gone: {event.text('reason')}")
    if event.kind in STOCK:
        _mismatch(
            post,
            f"the server runs without the plugin (it sent FedML's own message {event.kind}), "
            f"client {post.own} with it",
        )
    log.info("fedpara: a message of type %d is dropped", event.kind)


def _mismatch(post: Post, what: str) -> NoReturn:
    """Let the server know as well: its log says why, and it ends.

    FedML's server may still be about to write to this client, and would end with that error
    instead; so this listens until the server has said all.
    """
    text = f"{what}. Give both sides the same fedpara_* keys and the same runner"
    post.send(SERVER, FAILED, reason=text)
    end = time.monotonic() + FAREWELL
    while time.monotonic() < end and post.next(SILENCE) is not None:
        pass
    raise MismatchError(f"fedpara: {text}")


def _say_goodbye(post: Post) -> None:
    """Until the server has heard it."""
    deadline = time.monotonic() + FAREWELL
    while time.monotonic() < deadline:
        post.send(SERVER, BYE)
        event = post.next(1)
        if event is not None and event.kind in (CLOSE, GONE):
            return
