"""A queue that makes FedML's receiving loops wait, instead of polling as fast as they can.

In FedML the loop's thread also trains, so it does not poll then. In the plugin the loop has a
thread of its own, which would take half of a processor from the training.
"""

from __future__ import annotations

import queue
import time
from typing import Any

from fedpara_plugins_fedml.seams import replace_queue

__all__ = ["BlockingQueue", "use_blocking_queue"]

WAIT = 0.05
"""Seconds for which ``qsize`` of an empty queue waits."""


class BlockingQueue(queue.Queue[Any]):
    """A queue whose ``qsize`` waits for a moment while it is empty."""

    def qsize(self) -> int:
        """Return the number of entries; 0 only after a wait in which nothing came."""
        with self.not_empty:
            deadline = time.monotonic() + WAIT
            while not self._qsize() and (left := deadline - time.monotonic()) > 0:
                self.not_empty.wait(left)
            return self._qsize()


def use_blocking_queue(manager: Any) -> None:
    """Give one of FedML's communication managers such a queue, if its loop polls one."""
    replace_queue(manager, _moved)


def _moved(old: queue.Queue[Any]) -> BlockingQueue:
    new = BlockingQueue()
    while not old.empty():
        new.put(old.get())
    return new
