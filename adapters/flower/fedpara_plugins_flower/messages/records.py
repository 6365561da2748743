"""Conversion between Flower's records and named tensors, and the array that carries a payload."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from torch import Tensor

from fedpara_plugins.exchange import JOINT_RECORD, RecordKind
from fedpara_plugins_flower.messages.sixteen_bits import TypedRecord, array_of, tensor_of
from fedpara_plugins_flower.seams import NUMPY

__all__ = [
    "CHANGE",
    "PAYLOAD_KEY",
    "VARIATE",
    "array_bytes",
    "carried_payload",
    "is_optimizer_record",
    "kind_of",
    "payload_record",
    "place_payloads",
    "raw_bytes",
    "to_record",
    "to_tensors",
    "value_bytes",
    "with_content",
]

PAYLOAD_KEY = "fedpara.payload"
"""Name of the one array in which all tensors of a record are sent: each further array would cost
the transport about 2.5 kB in each direction."""

VARIATE = "fedpara.variate"
CHANGE = "fedpara.update.variate"

_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)"
    rb"(?P<header>\{'descr': '\|u1', 'fortran_order': (?:False|True), "
    rb"'shape': \((?P<size>[0-9]{1,15}),\), \} {0,200}\n)",
    re.DOTALL,
)
"""NumPy's format of bytes in one dimension, as ``numpy.save`` writes it."""


def is_optimizer_record(name: str) -> bool:
    """Return whether a record holds an optimizer's variates, which the plugin adds to messages.

    Its tensors have shared names of the model. It is not a model: nothing is merged into it.
    """
    return name in (VARIATE, CHANGE)


def kind_of(name: str) -> RecordKind:
    """Return what a record holds; all of the plugin's own are updates."""
    return "update" if is_optimizer_record(name) else "model"


def payload_record(payload: bytes) -> ArrayRecord:
    """Return a record whose only array is the payload, as uint8."""
    return ArrayRecord({PAYLOAD_KEY: Array(np.frombuffer(payload, dtype=np.uint8))})


def place_payloads(
    content: RecordDict, payloads: Mapping[str, bytes], names: Collection[str]
) -> None:
    """Put payloads in the place of records of arrays.

    Args:
        content: of a message; changed.
        payloads: by name of the record; or one of them all.
        names: of the records.
    """
    if JOINT_RECORD in payloads:
        for name in names:
            del content[name]
    for name, payload in payloads.items():
        content[name] = payload_record(payload)


def carried_payload(record: ArrayRecord) -> bytes | None:
    """Return the payload in a record; None if it is an ordinary record, or was changed.

    NumPy is not asked: it would take other formats for an array, and allocate what a forged header
    claims.
    """
    if list(record) != [PAYLOAD_KEY]:
        return None
    array = record[PAYLOAD_KEY]
    found = _NPY.match(array.data) if array.stype == NUMPY else None
    if found is None or len(array.data) - found.end() != int(found["size"]):
        return None
    size = int.from_bytes(found["length"], "little")
    return array.data[found.end() :] if len(found["header"]) == size else None


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the record's arrays as tensors, in order, with their dtypes."""
    return {key: tensor_of(array) for key, array in record.items()}


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as a record, in order, with their dtypes."""
    return TypedRecord({key: array_of(value) for key, value in tensors.items()})


def array_bytes(record: ArrayRecord) -> int:
    """Return the bytes of a record's arrays as Flower serialises them, without keys and framing."""
    return sum(len(array.data) for array in record.values())


def value_bytes(array: Array) -> int:
    """Return the bytes of an array's values alone, without NumPy's header.

    Apps of the legacy API may use a serialisation of their own, or send an empty placeholder. All
    bytes of those count.
    """
    if array.stype != NUMPY or not array.data:
        return len(array.data)
    return int(array.numpy().nbytes)


def raw_bytes(record: ArrayRecord) -> int:
    """Return the bytes of the arrays' values alone, without NumPy's headers."""
    return sum(map(value_bytes, record.values()))


def with_content(message: Message, content: RecordDict, *, node: int | None = None) -> Message:
    """Return a new message with other content.

    Strategies may share one message's content between nodes.

    Args:
        message: to a client.
        content: of the new message.
        node: that it goes to; the same one if None.
    """
    metadata = message.metadata
    return Message(
        content,
        dst_node_id=metadata.dst_node_id if node is None else node,
        message_type=metadata.message_type,
        ttl=metadata.ttl,
        group_id=metadata.group_id,
    )
