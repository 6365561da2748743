"""What a client keeps between rounds, in Flower's ``Context.state``: it never leaves the node."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.common import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedpara_plugins import ModelSpec
from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec, reference_hash
from fedpara_plugins_flower.records import carried_payload, payload_record

__all__ = ["ClientState"]

PRIVATE = "fedpara.private"
PROGRESS = "fedpara.progress"
REFERENCE = "fedpara.reference."
RESIDUAL = "fedpara.residual."


class ClientState:
    """The client's private factors, and per record the last tensors it received.

    Args:
        state: ``Context.state`` of the node; written only by the two ``keep`` methods.
    """

    def __init__(self, state: RecordDict) -> None:
        self._state = state

    def private(
        self, spec: ModelSpec, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], bool]:
        """The private factors by name, and whether they are the seeded first ones.

        Factors of another model (other names or shapes) count as none.

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
        """Replace the private factors."""
        if tensors:
            self._save(PRIVATE, tensors)

    def reference(self, record: str) -> dict[str, dict[str, Tensor]]:
        """The tensors last received in the record of that name, under their hash; {} if none."""
        held = self._load(REFERENCE + record)
        return {} if held is None else {reference_hash(held): held}

    def keep_reference(self, record: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors last received in the record of that name."""
        self._save(REFERENCE + record, tensors)

    def residual(self, record: str) -> dict[str, Tensor] | None:
        """What the codec lost of the last reply in that record; None if nothing is known."""
        return self._load(RESIDUAL + record)

    def keep_residual(self, record: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace what the codec lost; nothing (after a first contact) forgets it."""
        if tensors:
            self._save(RESIDUAL + record, tensors)
        else:
            self._state.pop(RESIDUAL + record, None)

    def steps(self) -> int | None:
        """Optimizer steps of the last round that this client trained; None before the first."""
        record = self._state.get(PROGRESS)
        return int(str(record["steps"])) if isinstance(record, ConfigRecord) else None

    def keep_steps(self, steps: int) -> None:
        """Replace the number of steps; 0 (an evaluation, say) changes nothing."""
        if steps:
            self._state[PROGRESS] = ConfigRecord({"steps": steps})

    def _load(self, key: str) -> dict[str, Tensor] | None:
        record = self._state.get(key)
        payload = carried_payload(record) if isinstance(record, ArrayRecord) else None
        if payload is None:
            return None
        return decode_payload(payload, limit=2 * len(payload)).tensors

    def _save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._state[key] = payload_record(encode_payload(dict(tensors), codec=parse_codec("none")))


def _same_shapes(kept: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> bool:
    return kept.keys() == first.keys() and all(kept[k].shape == first[k].shape for k in first)
