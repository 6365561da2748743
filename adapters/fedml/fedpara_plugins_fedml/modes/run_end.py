"""How a run ends for all: everybody is told, and has a moment to say that it knows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from fedpara_plugins import FedParaError
from fedpara_plugins_fedml.transport.peers import Post
from fedpara_plugins_fedml.transport.protocol import BYE, CLOSE, FAILED, GONE, HELLO, STOCK, Event

__all__ = ["dismiss", "part"]

log = logging.getLogger("fedpara.fedml")

FAREWELL = 5.0
"""Seconds that clients have to confirm that they know of a failure."""


def dismiss(post: Post, peers: Iterable[int], error: BaseException) -> None:
    """Tell others why the run ends, and give them a moment to say that they know.

    Soon after the start a party that has never been heard may be about to come, so that it has as
    long as one that is silent. A party without the plugin confirms nothing.

    Args:
        post: to them.
        peers: their ids.
        error: what happened.
    """
    reason = f"{error}" if isinstance(error, FedParaError) else f"{type(error).__name__}: {error}"
    reason = reason.removeprefix("fedpara: ")
    for peer in peers:
        post.send(peer, FAILED, reason=reason)
    log.critical("fedpara: the run has failed: %s", reason)
    left = set(peers) - post.gone() - post.without_plugin()
    last = time.monotonic()

    def tell(event: Event) -> None:
        nonlocal last
        if event.kind == HELLO or event.kind in STOCK:
            last = time.monotonic()
            post.send(event.peer, FAILED, reason=reason)
        if event.kind == GONE or event.kind in STOCK:
            left.discard(event.peer)

    def until() -> float:
        some = post.own == 0 and left & post.unheard()
        return max(last + FAREWELL, post.since + post.timeout if some else 0)

    try:
        part(post, left, tell, until)
    except FedParaError:
        log.warning("fedpara: not all clients could be told")


def part(
    post: Post,
    peers: set[int],
    other: Callable[[Event], None],
    until: Callable[[], float] | None,
) -> None:
    """Wait until all of some clients have said BYE, and close.

    Args:
        post: to them.
        peers: their ids; those that are gone are taken out of it while this waits.
        other: called with whatever else comes.
        until: the monotonic time at which to give up; None to wait until each has said BYE or is
            gone.
    """
    heard: set[int] = set()
    while peers - heard:
        seconds = None if until is None else until() - time.monotonic()
        if seconds is not None and seconds <= 0:
            break
        event = post.next(seconds)
        if event is None:
            continue
        if event.kind == BYE:
            heard.add(event.peer)
        else:
            other(event)
    for peer in heard:
        post.send(peer, CLOSE)
