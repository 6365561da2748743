"""FedML's receiving loops ask a queue for its size, as fast as they can; here they have to wait.

In FedML the loop's thread does the training too, so that it stands still then. Ours goes on, and
would take half of the processor from the training.
"""

from __future__ import annotations

import queue
import time
from typing import Any

__all__ = ["PatientQueue", "make_patient"]

PAUSE = 0.05
"""Seconds that the size of an empty queue takes."""


class PatientQueue(queue.Queue[Any]):
    """A queue whose ``qsize`` waits for a moment while it is empty."""

    def qsize(self) -> int:
        """The number of entries; 0 only after a pause in which nothing came."""
        with self.not_empty:
            deadline = time.monotonic() + PAUSE
            while not self._qsize() and (left := deadline - time.monotonic()) > 0:
                self.not_empty.wait(left)
            return self._qsize()


def make_patient(manager: Any) -> None:
    """Give a communication manager of FedML's such a queue, if its loop needs one."""
    servicer = getattr(manager, "grpc_servicer", None) or getattr(manager, "trpc_servicer", None)
    if servicer is not None:
        servicer.message_q = _moved(servicer.message_q)
    elif getattr(manager, "q_receiver", None) is not None:  # MPI
        patient = _moved(manager.q_receiver)
        manager.q_receiver = patient
        for thread in (manager._server_receive_thread, manager._client_receive_thread):
            if thread is not None:
                thread.q = patient


def _moved(old: queue.Queue[Any]) -> PatientQueue:
    new = PatientQueue()
    while not old.empty():
        new.put(old.get())
    return new
