"""A queue that makes FedML's receiving loops wait, and keeps from them what would end them.

In FedML the loop's thread also trains, so it does not poll then. In the plugin the loop has a
thread of its own, which would take half of a processor from the training. What is no message ends
the loop with an error, and in it all that a process would ever hear.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any

from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.seams import replace_queue

__all__ = ["BlockingQueue", "use_blocking_queue"]

WAIT = 0.05
"""Seconds for which ``qsize`` of an empty queue waits."""


class BlockingQueue(queue.Queue[Any]):
    """A queue whose ``qsize`` waits for a moment while it is empty.

    Args:
        accepts: says of an entry whether FedML's loop can read it; others are dropped.
    """

    def __init__(self, accepts: Callable[[Any], bool]) -> None:
        super().__init__()
        self._accepts = accepts

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add an entry, unless it is of no use."""
        if self._accepts(item):
            super().put(item, block, timeout)
        else:
            log.warning(
                "fedpara: a process has sent something that is no message of FedML: dropped"
            )

    def qsize(self) -> int:
        """Return the number of entries; 0 only after a wait in which nothing came."""
        with self.not_empty:
            deadline = time.monotonic() + WAIT
            while not self._qsize() and (left := deadline - time.monotonic()) > 0:
                self.not_empty.wait(left)
            return self._qsize()


def use_blocking_queue(manager: Any, accepts: Callable[[Any], bool]) -> None:
    """Give one of FedML's communication managers such a queue, if its loop polls one.

    Args:
        manager: FedML's, such as a GRPCCommManager.
        accepts: see `BlockingQueue`.
    """

    def moved(old: queue.Queue[Any]) -> BlockingQueue:
        new = BlockingQueue(accepts)
        while not old.empty():
            new.put(old.get())
        return new

    replace_queue(manager, moved)
