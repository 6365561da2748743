"""Checkpoints as a run writes them: each client's own model, and the server's last one."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedpara_plugins.errors import FedParaError
from fedpara_plugins.models.checkpoints import save_dense
from fedpara_plugins.support import (
    Outages,
    cause_of,
    close_folder_of,
    make_private_folder,
    remove_leftovers,
)

__all__ = ["close_own_checkpoints", "own_checkpoint", "server_checkpoint"]

OWN = "client-*.safetensors"
PARTIAL = f"{OWN}.*.partial"

_seen: set[str] = set()


def own_checkpoint(
    folder: Path, client: str, state: Mapping[str, Tensor], *, method: str, outages: Outages
) -> None:
    """Write a client's own dense model, which holds its private half: its owner alone can read it.

    A disk that refuses it costs the file alone.

    Args:
        folder: the option ``client_checkpoints``; closed to other users if nothing else is in it.
        client: its name.
        state: the dense model.
        method: the method that it was trained with.
        outages: gets what cannot be written.

    Raises:
        ConfigError: something else is in the folder's place, or others can read the files there and
            that cannot be changed.
        PayloadError: safetensors cannot hold a tensor.
    """
    path = folder / f"client-{client}.safetensors"
    about = f"the own model of client {client}"
    try:
        if not folder.is_dir():
            make_private_folder(folder)
        close_own_checkpoints(folder)
        save_dense(path, state, model=about, method=method, owner_only=True)
    except OSError as error:
        so = (
            "training goes on, and the client's own model is lost with this process, or older there"
        )
        outages.note("a client's checkpoint", path, error, so)


def close_own_checkpoints(folder: Path) -> None:
    """Close what is in the folder to other users, once a process, and remove leftovers.

    Args:
        folder: the option ``client_checkpoints``; a missing one stays so.

    Raises:
        ConfigError: others can read the files there and that cannot be changed.
        OSError: the disk refuses.
    """
    key = os.path.realpath(folder)
    if key in _seen or not folder.is_dir():
        return
    close_folder_of(folder, OWN, also=PARTIAL)
    remove_leftovers(folder, (PARTIAL,))
    _seen.add(key)


def server_checkpoint(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    model: str,
    method: str,
    log: logging.Logger,
    outages: Outages,
) -> FedParaError | None:
    """Write the server's dense model, else offer it in the system's folder for temporary files.

    Args:
        path: the option ``checkpoint``.
        state: the dense model.
        model: whose it is, in words.
        method: the method that it was trained with.
        log: gets where it lies.
        outages: gets what cannot be written.

    Returns:
        The error to end the process with, when all else is done; None if the file is written.

    Raises:
        PayloadError: safetensors cannot hold a tensor.
    """
    try:
        remove_leftovers(path.parent, (f"{path.name}.*.partial",))
        save_dense(path, state, model=model, method=method)
    except OSError as error:
        outages.note("the checkpoint", path, error, "it is offered elsewhere")
        place = _offer(state, model=model, method=method)
        if place is not None:
            log.error("fedpara: the server's model lies in %s instead: move it", place)
        return FedParaError(
            f"fedpara: the run is complete, and its checkpoint {path} could not be written "
            f"({cause_of(error)}); the server's model lies in "
            f"{place or 'no file: the temporary folder cannot be written either'}"
        )
    log.info("fedpara: dense checkpoint of the server's model written to %s", path.absolute())
    return None


def _offer(state: Mapping[str, Tensor], *, model: str, method: str) -> Path | None:
    try:
        folder = Path(tempfile.mkdtemp(prefix="fedpara-checkpoint-"))
        path = folder / "server.safetensors"
        save_dense(path, state, model=model, method=method)
    except OSError:
        return None
    return path
