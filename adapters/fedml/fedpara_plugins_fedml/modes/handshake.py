"""A client's messages with the server at the beginning and the end of a run."""

from __future__ import annotations

import time
from typing import NoReturn
from uuid import uuid4

from fedpara_plugins import FedParaError, MismatchError
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.modes.run_end import announce_failure
from fedpara_plugins_fedml.transport.peers import Endpoint
from fedpara_plugins_fedml.transport.protocol import (
    BYE,
    CHECK,
    CLOSE,
    FAILED,
    FEDML_TYPES,
    FINISH,
    GONE,
    HELLO,
    UNREADABLE,
    WELCOME,
    Event,
)

__all__ = ["SERVER", "connect", "leave", "refuse", "take_no_part"]

SERVER = 0

BYE_TIMEOUT = 15.0
"""Seconds that the server has to answer a BYE."""

QUIET_PERIOD = 3.0
"""Seconds without a message from FedML's server after which it has no more to send."""

TRPC_DELAY = 10.0
"""Seconds for which a client on TRPC waits for the first message of a server.

FedML's own server takes messages in a thread that runs before the rest of it is ready, and that
ends with an error if the first message of a client comes too early. Both FedML's own and the
plugin's server send a message when they are ready.
"""

HELLO_INTERVAL, LONG_HELLO_INTERVAL = 2.0, 10.0
"""Seconds between the HELLOs of a client. The longer interval is for a server that has been heard,
over a transport that loses nothing: FedML's own would send all clients a model each time."""

LOG_WAITING_AFTER = 10.0
"""Seconds of waiting after which a client logs what it waits for."""


def connect(endpoint: Endpoint, seconds: float, error: str = "") -> Event:
    """Send HELLO until the server answers, and return the first event of the run.

    Args:
        endpoint: to the server.
        seconds: that the server may take.
        error: reason why this client cannot take part.

    Raises:
        FedParaError: if it does not answer.
        MismatchError: if it seems to run without the plugin.
    """
    start, session = time.monotonic(), uuid4().hex
    end, logged = start + seconds, False
    while time.monotonic() < end:
        event = _try_once(endpoint, start, session, error)
        if event is not None and event.kind != CHECK:
            return event
        if event is not None:  # FedML's server: it answers all clients when the last has come
            end = min(end, time.monotonic() + endpoint.timeout)
        if endpoint.unanswered_for(SERVER) > endpoint.timeout:
            _end_mismatch(
                endpoint,
                f"the server takes messages and does not answer for {endpoint.timeout:.0f} s: it "
                f"runs without the plugin, or has ended; see its log",
            )
        if time.monotonic() > start + LOG_WAITING_AFTER and not logged:
            logged = True
            log.info(
                "fedpara: waiting for the server, up to %.0f s (fedpara_start_timeout)", seconds
            )
    if endpoint.status.without_plugin():
        return Event(CHECK, SERVER)
    raise FedParaError(
        f"fedpara: the server has not answered within {seconds:.0f} s (fedpara_start_timeout): "
        f"is it running, and with the plugin?"
    )


def _try_once(endpoint: Endpoint, start: float, session: str, error: str) -> Event | None:
    reliable = endpoint.backend == "TRPC"
    heard = SERVER not in endpoint.status.unheard()
    if not heard and time.monotonic() < start + (TRPC_DELAY if reliable else 0):
        return endpoint.next(0.1)
    endpoint.send(SERVER, HELLO, session=session, error=error)
    return endpoint.next(LONG_HELLO_INTERVAL if heard and reliable else HELLO_INTERVAL)


def refuse(endpoint: Endpoint, event: Event) -> None:
    """Raise for an event that ends the run; drop any other message.

    Raises:
        FedParaError: if the server has failed or is gone, or what it sends cannot be read.
        MismatchError: if it runs without the plugin.
    """
    if event.kind == FAILED:
        leave(endpoint)
        raise FedParaError(f"fedpara: the server ended the run: {event.text('reason')}")
    if event.kind == GONE:
        raise FedParaError(f"fedpara: the server is gone: {event.text('reason')}")
    if event.kind in FEDML_TYPES:
        _end_mismatch(
            endpoint,
            f"the server runs without the plugin (it sent FedML's own message {event.kind}), "
            f"client {endpoint.own} with it",
        )
    if event.kind == UNREADABLE:
        raise FedParaError(f"fedpara: {event.name} came from the server, again and again")
    log.info("fedpara: a message of type %d is dropped", event.kind)


def _end_mismatch(endpoint: Endpoint, reason: str) -> NoReturn:
    """Send the server the reason, which it logs before it ends, and raise it.

    FedML's server may be about to send this client a message, and would end with that error
    instead; so this function receives until the server has no more to send.
    """
    text = f"{reason}. Give both sides the same fedpara_* keys and the same runner"
    endpoint.send(SERVER, FAILED, reason=text)
    end = time.monotonic() + BYE_TIMEOUT
    while time.monotonic() < end and endpoint.next(QUIET_PERIOD) is not None:
        pass
    raise MismatchError(f"fedpara: {text}")


def take_no_part(endpoint: Endpoint, reason: str) -> bool:
    """Send the server the reason why this client cannot take part, and stay as long as it must.

    Args:
        endpoint: to the server.
        reason: in words.

    Returns:
        Whether it has stayed until the run has ended well: under ``mpirun``, whose processes can
        only end together.

    Raises:
        FedParaError, MismatchError: see `connect`.
    """
    event: Event | None = connect(endpoint, endpoint.timeout, error=reason)
    if event is not None and event.kind == WELCOME:
        log.critical("fedpara: %s. The run goes on without this client, which waits", reason)
    while event is None or event.kind in (WELCOME, CLOSE):
        event = endpoint.next()
    if event.kind in FEDML_TYPES:
        announce_failure(endpoint, [SERVER], FedParaError(reason))
    elif event.kind != GONE:
        leave(endpoint)
    return event.kind == FINISH and endpoint.backend == "MPI"


def leave(endpoint: Endpoint) -> None:
    """Send BYE until the server has confirmed it."""
    deadline = time.monotonic() + BYE_TIMEOUT
    while time.monotonic() < deadline:
        endpoint.send(SERVER, BYE)
        event = endpoint.next(1)
        if event is not None and event.kind in (CLOSE, GONE):
            return
