"""A client's variate or dual between rounds, next to the rest of its state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flwr.app import Context

from fedpara_plugins.optimizers import StoredCorrectionState
from fedpara_plugins_flower.client.storage import client_storage, lasting_name
from fedpara_plugins_flower.run import Run
from fedpara_plugins_flower.settings import FlowerSettings

__all__ = ["StoredCorrectionState", "open_correction_state"]


@contextlib.contextmanager
def open_correction_state(
    context: Context, algorithm: str, run: Run | None
) -> Iterator[StoredCorrectionState]:
    """Open a client's state for one algorithm: as part of a round of the mod, or on its own.

    In a round of the mod, changes are written when the reply is complete. Otherwise they are
    written at the end of the context.

    Args:
        context: of the client.
        algorithm: ``scaffold`` or ``feddyn``.
        run: that was active when the client's function was called, if any.
    """
    name = lasting_name(context)
    if run is not None and run.storage is not None:
        yield StoredCorrectionState(run.storage, algorithm, name)
        return
    folder = FlowerSettings.from_run_config(context.run_config).state_dir
    with contextlib.closing(client_storage(context, folder)) as storage:
        yield StoredCorrectionState(storage, algorithm, name)
        storage.commit()
