"""The end of a transport, and of a process that cannot end by itself.

FedML's own `finish` waits for the other processes (TRPC, MPI), fails on a message that comes late
(MPI), or is never called.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.seams import receiving_threads, stop_loop

__all__ = ["close_transport", "end_process"]

SHUTDOWN_TIMEOUT = 20.0
"""Seconds that an orderly end may take, in which all processes have to take part."""


def close_transport(manager: Any, backend: str, *, orderly: bool) -> bool:
    """End one of FedML's communication managers.

    Args:
        manager: FedML's, such as a GRPCCommManager.
        backend: its name.
        orderly: whether the other processes end now too; otherwise none is waited for.

    Returns:
        Whether all parts of it have ended.
    """
    if backend == "MPI":
        return _close_mpi(manager, orderly)
    if backend == "TRPC":
        return _close_trpc(manager, orderly)
    with contextlib.suppress(Exception):
        manager.stop_receive_message()
    return True


def _close_mpi(manager: Any, orderly: bool) -> bool:
    """Do what ``stop_receive_message`` does, which fails if a message is left in a queue."""
    stop_loop(manager, "MPI")
    for thread in receiving_threads(manager):
        thread.stop()
        thread.join(5)
    if orderly:
        from mpi4py import MPI  # type: ignore[import-not-found]

        MPI.Finalize()
    return orderly


def _close_trpc(manager: Any, orderly: bool) -> bool:
    """Shut RPC down, which waits for all processes; without it the interpreter may not end."""
    done = orderly and _returns_within(SHUTDOWN_TIMEOUT, manager.stop_receive_message)
    stop_loop(manager, "TRPC")
    return done


def _returns_within(seconds: float, function: Callable[[], object]) -> bool:
    """Return whether a function returns in time; if not, it continues in its thread."""
    returned = threading.Event()

    def run() -> None:
        with contextlib.suppress(Exception):
            function()
            returned.set()

    threading.Thread(target=run, daemon=True).start()
    return returned.wait(seconds)


def end_process(reason: str, code: int = 1) -> None:
    """Log a reason and end this process with a code, whatever its other threads wait for."""
    log.log(logging.CRITICAL if code else logging.INFO, "fedpara: %s", reason)
    for handler in [*logging.getLogger().handlers, *log.handlers]:
        with contextlib.suppress(Exception):
            handler.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
