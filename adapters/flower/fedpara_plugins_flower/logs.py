"""The adapter's logger, and the core's log lines in Flower's log, which shows its own alone."""

from __future__ import annotations

import logging

from fedpara_plugins_flower.seams import FLOWER_LOGGER

__all__ = ["log", "show_core_logs"]

CORE_LOGGERS = ("fedpara", "fedpara_plugins")

log = logging.getLogger(f"{FLOWER_LOGGER}.fedpara")
"""The logger of all modules of the adapter."""


class _Forwarder(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if log.isEnabledFor(record.levelno):
            log.handle(record)


def show_core_logs() -> None:
    """Forward the core's log records to Flower's logger; further calls change nothing."""
    for logger in map(logging.getLogger, CORE_LOGGERS):
        if not any(isinstance(handler, _Forwarder) for handler in logger.handlers):
            logger.addHandler(_Forwarder())
            logger.setLevel(logging.INFO)
            # Flower's handlers show the record; a root logger of the app must not show it again.
            logger.propagate = False
