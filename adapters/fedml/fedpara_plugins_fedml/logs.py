"""Where the plugin's log lines go."""

from __future__ import annotations

import logging

__all__ = ["follow_fedml"]

OURS = ("fedpara", "fedpara_plugins")


def follow_fedml() -> None:
    """Let our lines appear among FedML's.

    ``fedml.init`` puts a logger of its own in the place of ``logging.root``. The real one, to which
    all other loggers go on sending their lines, has no handler then.
    """
    for name in OURS:
        logger = logging.getLogger(name)
        if logging.root is not logger.manager.root:
            logger.parent = logging.root
            logger.setLevel(logger.level)  # forgets which levels it thought were off
