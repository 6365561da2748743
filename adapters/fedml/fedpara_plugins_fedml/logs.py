"""The adapter's logger, and its place among FedML's loggers."""

from __future__ import annotations

import logging

from fedpara_plugins_fedml.seams import replaced_root_logger

__all__ = ["log", "show_among_fedml_logs"]

LOGGERS = ("fedpara", "fedpara_plugins")
"""Parents of all loggers of the plugin."""

log = logging.getLogger("fedpara.fedml")
"""The logger of all modules of the adapter."""


def show_among_fedml_logs() -> None:
    """Let the plugin's records go to the logger that FedML shows, if it has replaced the root."""
    root = replaced_root_logger()
    if root is None:
        return
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.parent = root
        logger.setLevel(logger.level)  # clears the cache of levels that are off
