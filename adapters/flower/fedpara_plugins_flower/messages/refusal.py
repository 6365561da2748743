"""A client's reply to a server that lacks the plugin: it ends the run and says why."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedpara_plugins_flower.logs import log
from fedpara_plugins_flower.messages.snippets import ADD_WRAPPER
from fedpara_plugins_flower.seams import (
    EVALUATE_METRICS,
    EXAMPLES,
    LEGACY_EXAMPLES,
    LEGACY_REPLIES,
    NORM_BIT,
    NUMPY,
    is_legacy,
)

__all__ = ["refuse_plain_message"]

REASON = (
    f"fedpara: the server sends plain arrays, while this client's options turn the plugin on. Add "
    f"to the server: {ADD_WRAPPER}, with the same options"
)


EXPECTED: dict[str, int | float | list[int] | list[float]] = {EXAMPLES: 1, NORM_BIT: 0}
"""Metrics without which some strategies raise errors of their own before they read an array."""


def refuse_plain_message(message: Message) -> Message:
    """Return a reply that no strategy can aggregate, and whose failure says why.

    The server would log an error reply and continue for all rounds without a result. Flower allows
    any serialisation type of an array, and the error of reading an unknown one contains its name:
    the name is the reason. The legacy API does not look at the type. It gets an array whose header
    is the reason, which NumPy's error repeats.
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
    """Return the content of a legacy client's reply, with arrays that cannot be parsed."""
    evaluation = EVALUATE_METRICS.replace(".metrics", ".parameters")
    name = LEGACY_REPLIES.get(message.metadata.message_type, evaluation)
    result = name.removesuffix(".parameters")
    array = Array(dtype="", shape=(), stype=NUMPY, data=_npy_with_header(REASON))
    arrays = {key: array for record in message.content.array_records.values() for key in record}
    return RecordDict(
        {
            name: ArrayRecord(arrays),
            f"{result}.num_examples": MetricRecord({LEGACY_EXAMPLES: 1}),
            f"{result}.loss": MetricRecord({"loss": 0.0}),
            f"{result}.metrics": ConfigRecord(),
            f"{result}.status": ConfigRecord({"code": 0, "message": REASON}),
        }
    )


def _npy_with_header(text: str) -> bytes:
    """Return NumPy's format, version 3: magic, the header's length in four bytes, the header."""
    header = text.encode()
    return b"\x93NUMPY\x03\x00" + len(header).to_bytes(4, "little") + header
