"""How a client ends the run of a server that lacks the plugin, where none of our code runs."""

from __future__ import annotations

import logging

from flwr.common import Array, ArrayRecord, Message, MetricRecord, RecordDict

__all__ = ["refuse_plain_message"]

log = logging.getLogger("flwr.fedpara")

REASON = (
    "fedpara: the server runs without the plugin, while this run's config turns it on. Add to the "
    "server: app = fedpara.server_app(ServerApp())"
)


def refuse_plain_message(message: Message) -> Message:
    """A reply that no strategy can aggregate, and whose failure says why.

    An error reply would be logged and the run go on for all its rounds without a result. Flower
    lets arrays have a serialisation type of their own, and reading one that the server does not
    know raises an error with the type's name in it: the reason stands there.
    """
    log.error(REASON)
    unreadable = Array(dtype="float32", shape=(), stype=REASON, data=b"")
    content = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
    for name, record in message.content.array_records.items():
        content[name] = ArrayRecord(dict.fromkeys(record, unreadable))
    return Message(content, reply_to=message)
