"""How a client ends the run of a server that lacks the plugin, where none of our code runs."""

from __future__ import annotations

import logging

from flwr.common import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedpara_plugins_flower.messages.legacy_lists import REPLIES, is_legacy
from fedpara_plugins_flower.messages.snippets import ADD_WRAPPER

__all__ = ["refuse_plain_message"]

log = logging.getLogger("flwr.fedpara")

REASON = (
    f"fedpara: the server sends plain arrays, while this client's options turn the plugin on. Add "
    f"to the server: {ADD_WRAPPER}, with the same options"
)


EXPECTED: dict[str, int | float | list[int] | list[float]] = {"num-examples": 1, "norm_bit": 0}
"""Figures without which some strategy ends before it reads an array, with an error of its own."""


def refuse_plain_message(message: Message) -> Message:
    """A reply that no strategy can aggregate, and whose failure says why.

    An error reply would be logged and the run go on for all its rounds without a result. Flower
    lets arrays have a serialisation type of their own, and reading one that the server does not
    know raises an error with the type's name in it: the reason stands there. The legacy API never
    looks at that type; it gets an array whose header is the reason, which NumPy's error repeats.
    """
    log.error(REASON)
    if is_legacy(message):
        return Message(_unreadable_result(message), reply_to=message)
    unreadable = Array(dtype="float32", shape=(), stype=REASON, data=b"")
    content = RecordDict({"metrics": MetricRecord(EXPECTED)})
    for name, record in message.content.array_records.items():
        content[name] = ArrayRecord(dict.fromkeys(record, unreadable))
    return Message(content, reply_to=message)


def _unreadable_result(message: Message) -> RecordDict:
    """What a legacy client's answer consists of, with arrays that cannot be parsed."""
    name = REPLIES.get(message.metadata.message_type, "evaluateres.parameters")
    result = name.removesuffix(".parameters")
    array = Array(dtype="", shape=(), stype="numpy.ndarray", data=_npy_with_header(REASON))
    arrays = {key: array for record in message.content.array_records.values() for key in record}
    return RecordDict(
        {
            name: ArrayRecord(arrays),
            f"{result}.num_examples": MetricRecord({"num_examples": 1}),
            f"{result}.loss": MetricRecord({"loss": 0.0}),
            f"{result}.metrics": ConfigRecord(),
            f"{result}.status": ConfigRecord({"code": 0, "message": REASON}),
        }
    )


def _npy_with_header(text: str) -> bytes:
    """NumPy's format, version 3: magic, the header's length in four bytes, the header."""
    header = text.encode()
    return b"\x93NUMPY\x03\x00" + len(header).to_bytes(4, "little") + header
