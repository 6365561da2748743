"""Storage of a client's state between rounds: a file of its own, or Flower's context."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from flwr.app import ArrayRecord, Context, RecordDict

from fedpara_plugins import ConfigError
from fedpara_plugins.exchange import ClientState
from fedpara_plugins.support import (
    BackedStorage,
    Keeper,
    Outages,
    StateDirHold,
    Storage,
    hold_state_dir,
    started_at,
)
from fedpara_plugins_flower.logs import log
from fedpara_plugins_flower.messages.records import carried_payload, payload_record
from fedpara_plugins_flower.seams import supernode_of_this_process

__all__ = [
    "OUTAGES",
    "client_name",
    "client_state",
    "client_storage",
    "lasting_name",
    "state_file",
]

OUTAGES = Outages(log)
"""Of all clients in this process: each file that the disk refuses is logged once."""

PREFIX = "fedpara."
"""Of the names in ``Context.state``, where the app has its own."""

NAMES = ("fedpara-id", "partition-id")
"""Entries of a node's config that name it in the same way after a restart, the first one first."""


def client_name(context: Context) -> str:
    """Return the name that this client keeps after a restart.

    Raises:
        ConfigError: the node's config gives it no lasting name.
    """
    name = next((context.node_config[key] for key in NAMES if key in context.node_config), None)
    text = str(name if name is not None else "")
    if not text or not all(c.isalnum() or c in "-_." for c in text) or text.startswith("."):
        raise ConfigError(
            f"fedpara: the option state-dir keeps files by the client's name, and this node's "
            f"config has none of letters, digits, '-', '_' and '.' (fedpara-id or partition-id, "
            f"got {text!r}). Start the node with flower-supernode --node-config "
            f"'fedpara-id=\"hospital-3\"'"
        )
    return text


def client_storage(
    context: Context, state_dir: Path | None, others: Collection[str] = ()
) -> Storage:
    """Open the storage of this client's lasting state: a file of its own, or ``Context.state``.

    What the disk refuses is kept in ``Context.state`` until it takes it. The state-dir is held for
    this run until the storage is closed.

    Args:
        context: of the client.
        state_dir: the option of that name.
        others: runs that go on besides this one, as far as the server knows.

    Raises:
        ConfigError: see `client_name` and `hold_state_dir`.
    """
    in_context = _ContextStorage(context.state)
    if state_dir is None:
        return in_context
    path = state_file(context, state_dir)
    hold = hold_state_dir(
        state_dir,
        run=str(context.run_id),
        keeper=_supernode(),
        others=others,
        outages=OUTAGES,
    )
    try:
        return _HeldStorage(path, in_context, hold)
    except BaseException:
        hold.release()
        raise


@cache
def _supernode() -> Keeper | None:
    """Return the SuperNode that this process works for, which holds the state-dir while it lives.

    None in simulation, and where it cannot be known: the state-dir is free between messages then.
    """
    found = supernode_of_this_process()
    if found is None:
        return None
    pid, superlink = found
    what = f"a SuperNode of {superlink or 'the default SuperLink'}"
    return Keeper(pid, started_at(pid) or "", superlink, what)


def client_state(context: Context, state_dir: Path | None, storage: Storage) -> ClientState:
    """Return a client's state, with the client's name and storage as the log states them."""
    if state_dir is None:
        return ClientState(storage, lasting_name(context) or context.node_id, "its Context.state")
    return ClientState(storage, client_name(context), state_file(context, state_dir))


def state_file(context: Context, state_dir: Path) -> Path:
    """Return the file of this client's lasting state.

    Raises:
        ConfigError: see `client_name`.
    """
    return state_dir / "clients" / f"{client_name(context)}.sqlite"


def lasting_name(context: Context) -> str | None:
    """Return the name that this client keeps after a restart; None if its config gives none."""
    found = (str(context.node_config[key]) for key in NAMES if key in context.node_config)
    return next(found, None)


class _HeldStorage(BackedStorage):
    """The storage in a state-dir, which it holds until it is closed."""

    def __init__(self, path: Path, memory: Storage, hold: StateDirHold) -> None:
        super().__init__(path, memory, OUTAGES)
        self._hold = hold

    def close(self) -> None:
        """Discard all changes since the last `commit`, close the file, release the folder."""
        super().close()
        self._hold.release()


class _ContextStorage(Storage):
    """A `Storage` in the records that Flower keeps for a node."""

    def __init__(self, state: RecordDict) -> None:
        super().__init__()
        self._state = state

    def _stored(self) -> dict[str, None]:
        return {key[len(PREFIX) :]: None for key in self._state if key.startswith(PREFIX)}

    def _read(self, key: str) -> bytes | None:
        record = self._state.get(PREFIX + key)
        return carried_payload(record) if isinstance(record, ArrayRecord) else None

    def _write(self, changes: Mapping[str, bytes | None]) -> None:
        for key, value in changes.items():
            if value is None:
                self._state.pop(PREFIX + key, None)
            else:
                self._state[PREFIX + key] = payload_record(value)
