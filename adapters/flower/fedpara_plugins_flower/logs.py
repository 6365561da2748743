"""The core's log lines in Flower's log, which shows no other logger's."""

from __future__ import annotations

import logging

__all__ = ["show_core_logs"]

CORE = ("fedpara", "fedpara_plugins")
FLOWER = "flwr.fedpara"


class _Forwarder(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        target = logging.getLogger(FLOWER)
        if target.isEnabledFor(record.levelno):
            target.handle(record)


def show_core_logs() -> None:
    """Hand what the core logs to Flower's logger, once a process."""
    for core in map(logging.getLogger, CORE):
        if not any(isinstance(handler, _Forwarder) for handler in core.handlers):
            core.addHandler(_Forwarder())
            core.setLevel(logging.INFO)
            # Flower's handlers show it; a root logger that the app set up need not do so again.
            core.propagate = False
