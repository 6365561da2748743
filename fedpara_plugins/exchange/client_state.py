"""What a client keeps between rounds, in any framework; it never leaves the device."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from torch import Tensor

from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.references import ClientReferences
from fedpara_plugins.spec import ModelSpec
from fedpara_plugins.storage import Part

__all__ = ["ClientState"]

PRIVATE = "private"
STEPS = "steps"
REFERENCE = "reference/"
RESIDUAL = "residual/"


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


def _same_shapes(kept: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> bool:
    return kept.keys() == first.keys() and all(kept[k].shape == first[k].shape for k in first)
