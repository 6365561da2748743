"""Flower's records to named tensors and back, and the one array that carries a payload."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.common import Array, ArrayRecord, Message, RecordDict
from torch import Tensor

from fedpara_plugins.exchange import RecordKind

__all__ = [
    "CHANGE",
    "PAYLOAD_KEY",
    "VARIATE",
    "array_bytes",
    "carried_payload",
    "is_side",
    "kind_of",
    "payload_record",
    "raw_bytes",
    "to_record",
    "to_tensors",
    "value_bytes",
    "with_content",
]

PAYLOAD_KEY = "fedpara.payload"
"""All tensors of a record travel in one array: each array of its own would cost the transport
about 2.5 kB in each direction."""

VARIATE = "fedpara.variate"
CHANGE = "fedpara.update.variate"


def is_side(name: str) -> bool:
    """Whether a record is one that the plugin adds beside the model: an optimizer's variates.

    They are tensors of the model's shared names, but no model: nothing is filled in.
    """
    return name in (VARIATE, CHANGE)


def kind_of(name: str) -> RecordKind:
    """Return what a record holds; all of the plugin's own are updates."""
    return "update" if is_side(name) else "model"


def payload_record(payload: bytes) -> ArrayRecord:
    """A record whose only array is the payload, as uint8."""
    return ArrayRecord({PAYLOAD_KEY: Array(np.frombuffer(payload, dtype=np.uint8))})


def carried_payload(record: ArrayRecord) -> bytes | None:
    """The payload that a record carries, or None if it is an ordinary record, or changed."""
    if list(record) != [PAYLOAD_KEY]:
        return None
    array = record[PAYLOAD_KEY].numpy()
    return array.tobytes() if array.dtype == np.uint8 else None


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """The record's arrays as tensors, in order, with their dtypes."""
    return {key: torch.from_numpy(np.array(array.numpy())) for key, array in record.items()}


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a record, in order, with their dtypes."""
    return ArrayRecord({key: Array(value.cpu().numpy()) for key, value in tensors.items()})


def array_bytes(record: ArrayRecord) -> int:
    """Bytes of all arrays of a record as Flower serialises them, without keys and framing."""
    return sum(len(array.data) for array in record.values())


def value_bytes(array: Array) -> int:
    """Bytes of an array's values alone, without NumPy's header.

    Apps of the legacy API may serialise in a way of their own, or send an empty place holder:
    those count as they are.
    """
    if array.stype != "numpy.ndarray" or not array.data:
        return len(array.data)
    return int(array.numpy().nbytes)


def raw_bytes(record: ArrayRecord) -> int:
    """Bytes of the arrays' values alone, without NumPy's headers."""
    return sum(map(value_bytes, record.values()))


def with_content(message: Message, content: RecordDict) -> Message:
    """A new message to the same node with other content; strategies may share one between nodes."""
    metadata = message.metadata
    return Message(
        content,
        dst_node_id=metadata.dst_node_id,
        message_type=metadata.message_type,
        ttl=metadata.ttl,
        group_id=metadata.group_id,
    )
