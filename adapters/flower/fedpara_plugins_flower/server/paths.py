"""Log lines that state where relative paths among a run's options lead."""

from __future__ import annotations

from fedpara_plugins_flower.logs import log
from fedpara_plugins_flower.settings import FlowerSettings

__all__ = ["log_relative_paths"]

ON_SERVER = ("ledger", "checkpoint", "state_dir")
ON_CLIENTS = ("client_checkpoints", "state_dir")


def log_relative_paths(settings: FlowerSettings) -> None:
    """Log where a run's relative paths lead, on the server at the beginning of the run.

    The programs that Flower starts run in the folder where the SuperLink or SuperNode was started,
    whatever the folder of the app or of ``flwr run``.
    """
    for name in dict.fromkeys((*ON_SERVER, *ON_CLIENTS)):
        path = getattr(settings, name)
        if path is None or path.is_absolute():
            continue
        places = []
        if name in ON_SERVER:
            places.append(f"on the server {path.absolute()}")
        if name in ON_CLIENTS:
            places.append(
                "on each client in the folder where its SuperNode was started (in simulation, "
                "where the SuperLink was)"
            )
        option = name.replace("_", "-")
        log.info("fedpara: %s = %s is relative: %s", option, path, "; ".join(places))
