"""The end of a run for all processes: each gets the reason, and time to confirm it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from fedpara_plugins import FedParaError
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.transport.peers import Endpoint
from fedpara_plugins_fedml.transport.protocol import (
    BYE,
    CLOSE,
    FAILED,
    FEDML_TYPES,
    GONE,
    HELLO,
    Event,
)

__all__ = ["announce_failure", "wait_for_byes"]

CONFIRM_TIMEOUT = 5.0
"""Seconds that clients have to confirm that they know of a failure."""


def announce_failure(endpoint: Endpoint, peers: Iterable[int], error: BaseException) -> None:
    """Send others the reason why the run ends, and give them a moment to confirm it.

    Soon after the start, a peer that has never been heard may still be about to come; it has as
    long as a peer that is silent. A peer without the plugin confirms nothing.

    Args:
        endpoint: to the peers.
        peers: their ids.
        error: that ended the run.
    """
    reason = f"{error}" if isinstance(error, FedParaError) else f"{type(error).__name__}: {error}"
    reason = reason.removeprefix("fedpara: ")
    for peer in peers:
        endpoint.send(peer, FAILED, reason=reason)
    log.critical("fedpara: the run has failed: %s", reason)
    status = endpoint.status
    left = set(peers) - status.gone() - status.without_plugin()
    last = time.monotonic()

    def on_other(event: Event) -> None:
        nonlocal last
        if event.kind == HELLO or event.kind in FEDML_TYPES:
            last = time.monotonic()
            endpoint.send(event.peer, FAILED, reason=reason)
        if event.kind == GONE or event.kind in FEDML_TYPES:
            left.discard(event.peer)

    def deadline() -> float:
        some = endpoint.own == 0 and left & status.unheard()
        return max(last + CONFIRM_TIMEOUT, endpoint.since + endpoint.timeout if some else 0)

    try:
        wait_for_byes(endpoint, left, on_other, deadline)
    except FedParaError:
        log.warning("fedpara: not all clients could be notified")


def wait_for_byes(
    endpoint: Endpoint,
    peers: set[int],
    on_other: Callable[[Event], None],
    deadline: Callable[[], float],
) -> None:
    """Wait until each of some clients has sent BYE, and send them CLOSE.

    Args:
        endpoint: to the clients.
        peers: their ids; the caller removes those that are gone while this function waits.
        on_other: called with all other events.
        deadline: returns the monotonic time at which to give up.
    """
    heard: set[int] = set()
    while peers - heard:
        seconds = deadline() - time.monotonic()
        if seconds <= 0:
            break
        event = endpoint.next(seconds)
        if event is None:
            continue
        if event.kind == BYE:
            heard.add(event.peer)
        else:
            on_other(event)
    for peer in heard:
        endpoint.send(peer, CLOSE)
