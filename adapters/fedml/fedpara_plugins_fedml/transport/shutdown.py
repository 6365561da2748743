"""How a transport ends, and how a process does that cannot end by itself.

FedML's own `finish` waits for the other parties (TRPC, MPI), or trips over a message that came late
(MPI), or is never reached.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["close_transport", "end_process"]

log = logging.getLogger("fedpara.fedml")

PATIENCE = 20.0
"""Seconds that an orderly end may take, in which all parties have to take part."""


def close_transport(manager: Any, backend: str, *, orderly: bool) -> bool:
    """End one of FedML's communication managers; False if parts of it go on.

    Args:
        manager: FedML's, such as a GRPCCommManager.
        backend: its name.
        orderly: whether the other parties end now too; otherwise nobody is waited for.
    """
    if backend == "MPI":
        return _close_mpi(manager, orderly)
    if backend == "TRPC":
        return _close_trpc(manager, orderly)
    with contextlib.suppress(Exception):
        manager.stop_receive_message()
    return True


def _close_mpi(manager: Any, orderly: bool) -> bool:
    """As its ``stop_receive_message``, which fails if a message is left in a queue."""
    manager._stop_running = True
    for thread in (manager._server_receive_thread, manager._client_receive_thread):
        if thread is not None:
            thread.stop()
            thread.join(5)
    if orderly:
        from mpi4py import MPI  # type: ignore[import-not-found]

        MPI.Finalize()
    return orderly


def _close_trpc(manager: Any, orderly: bool) -> bool:
    """``rpc.shutdown`` waits for all parties; without it the interpreter may not end."""
    done = orderly and _within(PATIENCE, manager.stop_receive_message)
    manager.is_running = False
    return done


def _within(seconds: float, function: Callable[[], object]) -> bool:
    """Whether a function returns in time; it goes on in its thread if not."""
    returned = threading.Event()

    def run() -> None:
        with contextlib.suppress(Exception):
            function()
            returned.set()

    threading.Thread(target=run, daemon=True).start()
    return returned.wait(seconds)


def end_process(reason: str, code: int = 1) -> None:
    """End this process with a code, whatever its other threads wait for; the reason is logged."""
    log.log(logging.CRITICAL if code else logging.INFO, "fedpara: %s", reason)
    for handler in [*logging.getLogger().handlers, *log.handlers]:
        with contextlib.suppress(Exception):
            handler.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
