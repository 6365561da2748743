"""The state-dir of a run, held by one run at a time."""

from __future__ import annotations

import os
import weakref
from typing import Any

from fedpara_plugins import ConfigError
from fedpara_plugins.support import StateDirHold, hold_state_dir
from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = ["hold_for"]


def hold_for(owner: object, settings: FedMLSettings, args: Any, *, alone: bool) -> StateDirHold:
    """Hold the state-dir for a process of a run.

    Args:
        owner: the object that uses it; the hold ends with it at the latest.
        settings: of the run.
        args: FedML's; processes of one run have the same ``run_id``.
        alone: whether the run has this process alone. FedML's ``run_id`` is 0 unless a project sets
            it, so the process is part of the run's name then.

    Raises:
        ConfigError: another run uses the folder, or another process has this rank in this one.
    """
    if settings.state_dir is None:
        return StateDirHold(None)
    run, role = str(getattr(args, "run_id", 0)), "server"
    if alone:
        run = f"{run} of process {os.getpid()}"
    elif int(args.rank) != 0:
        role = f"client {args.rank}"
    try:
        hold = hold_state_dir(settings.state_dir, run=run, role=role)
    except ConfigError as error:
        text = str(error).removeprefix("fedpara: ")
        raise ConfigError(f"fedpara: fedpara_state_dir: {text}") from error
    weakref.finalize(owner, hold.release)
    return hold
