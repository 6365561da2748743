"""What a client keeps between rounds; it never leaves the node."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path

from flwr.common import ArrayRecord, Context, RecordDict
from torch import Tensor

from fedpara_plugins import ConfigError, ModelSpec, PayloadError
from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.references import ClientReferences
from fedpara_plugins.storage import FileStorage, Part, Storage
from fedpara_plugins_flower.records import carried_payload, payload_record

__all__ = ["ClientState", "client_name", "client_storage", "lasting_name"]

PREFIX = "fedpara."
"""Of the names in ``Context.state``, where the app has its own."""

PRIVATE = "private"
STEPS = "steps"
REFERENCE = "reference/"
RESIDUAL = "residual/"

NAMES = ("fedpara-id", "partition-id")
"""Entries of a node's config that name it in the same way after a restart, the first one first."""


def client_name(context: Context) -> str:
    """What this client is called after a restart too.

    Raises:
        ConfigError: the node's config names it in no way that lasts.
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


def client_storage(context: Context, state_dir: Path | None) -> Storage:
    """Where this client keeps what must last: a file of its own, or Flower's ``Context.state``.

    Raises:
        ConfigError: see `client_name`.
    """
    if state_dir is None:
        return _ContextStorage(context.state)
    return FileStorage(state_dir / "clients" / f"{client_name(context)}.sqlite")


def lasting_name(context: Context) -> str | None:
    """What this client is called after a restart too; None if its node's config does not say."""
    found = (str(context.node_config[key]) for key in NAMES if key in context.node_config)
    return next(found, None)


class ClientState:
    """The client's private state, what it received, and what its codec lost.

    Args:
        storage: written only by the ``keep`` methods; to be committed by the caller.
    """

    def __init__(self, storage: MutableMapping[str, bytes]) -> None:
        self._storage = storage
        self.references = ClientReferences(Part(storage, REFERENCE))

    def private(
        self, spec: ModelSpec, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], bool]:
        """The private tensors by name, and whether they are the seeded first ones.

        Those of another model (other names or shapes) count as none.

        Args:
            spec: the model.
            shared: its shared state, for the dtypes.
        """
        first = spec.initial_private(shared)
        kept = self._load(PRIVATE)
        if kept is not None and _same_shapes(kept, first):
            return kept, False
        return first, True

    def keep_private(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the private tensors."""
        if tensors:
            self._save(PRIVATE, tensors)

    def residual(self, record: str) -> dict[str, Tensor] | None:
        """What the codec lost of the last reply in that record; None if nothing is known."""
        return self._load(RESIDUAL + record)

    def keep_residual(self, record: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace what the codec lost; nothing (after a first contact) forgets it."""
        if tensors:
            self._save(RESIDUAL + record, tensors)
        else:
            self._storage.pop(RESIDUAL + record, None)

    def steps(self) -> int | None:
        """Optimizer steps of the last round that this client trained; None before the first."""
        text = self._storage.get(STEPS, b"").decode("ascii", "replace")
        return int(text) if text.isdecimal() else None

    def keep_steps(self, steps: int) -> None:
        """Replace the number of steps; 0 (an evaluation, say) changes nothing."""
        if steps:
            self._storage[STEPS] = str(steps).encode()

    def _load(self, key: str) -> dict[str, Tensor] | None:
        payload = self._storage.get(key)
        if payload is None:
            return None
        try:
            return decode_payload(payload, limit=2 * len(payload)).tensors
        except PayloadError:
            return None  # what is damaged is not held

    def _save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._storage[key] = encode_payload(dict(tensors), codec=parse_codec("none"))


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


def _same_shapes(kept: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> bool:
    return kept.keys() == first.keys() and all(kept[k].shape == first[k].shape for k in first)
