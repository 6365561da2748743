"""A client's reply to SCAFFOLD or FedDyn as the strategy uses it, after all checks."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, MetricRecord

from fedpara_plugins import PayloadError
from fedpara_plugins.exchange import examples_of
from fedpara_plugins.models import check_finite
from fedpara_plugins.optimizers import ClientUpdate, State, finite
from fedpara_plugins_flower.messages.drift_records import ClientReport, from_bitmap
from fedpara_plugins_flower.messages.records import to_tensors

__all__ = ["LINES", "ClientReply", "ReportAndChange", "read_reply"]

LINES = (
    "with fedpara.correction(model, msg, context) as correction: train(...), and "
    "Message(correction.add_to(content), reply_to=msg)"
)
"""The lines that a user adds to the client's train function."""

ReportAndChange = tuple[ClientReport, ArrayRecord | None]


@dataclass(frozen=True)
class ClientReply:
    """One client's usable reply.

    Attributes:
        node: its id.
        report: of the client.
        reply: its arrays, the names that were trained, and its number of examples.
        change: of its variate; {} where the server computes it.
        message: that Flower received.
    """

    node: int
    report: ClientReport
    reply: ClientUpdate
    change: State
    message: Message


def read_reply(
    message: Message,
    found: ReportAndChange | None,
    *,
    model: State,
    examples_key: str,
    weighs: bool,
    needs_change: bool,
) -> ClientReply:
    """Return the usable content of a reply.

    Args:
        message: the reply, without its report and change.
        found: its report and change; None if it had none.
        model: that was sent.
        examples_key: metric of the number of examples.
        weighs: whether the reply counts by that number.
        needs_change: whether the algorithm needs the change of a variate.

    Raises:
        PayloadError: if the reply cannot be used.
    """
    if found is None:
        raise PayloadError(
            f"it lacks the records of fedpara.correction; the client's train function needs {LINES}"
        )
    report, record = found
    arrays = {
        name: value
        for part in message.content.array_records.values()
        for name, value in to_tensors(part).items()
    }
    change = {} if record is None else to_tensors(record)
    if len(report.names) > len(arrays) // 8 + 1:
        raise PayloadError(f"its report names its parameters in {len(report.names)} bytes")
    names = from_bitmap(report.names, arrays)
    _check(report, arrays, change, names, model)
    if needs_change and change.keys() != names:
        raise PayloadError("its variate's names are not those of its trained parameters")
    metrics = next(iter(message.content.metric_records.values()), MetricRecord())
    examples = examples_of(metrics.get(examples_key, 1.0), name=examples_key, weighs=weighs)
    reply = ClientUpdate(arrays, names, examples)
    return ClientReply(message.metadata.src_node_id, report, reply, change, message)


def _check(
    report: ClientReport, arrays: State, change: State, names: frozenset[str], model: State
) -> None:
    if report.kept == 0.0:
        raise PayloadError("its training gave NaN or infinity")
    check_finite(arrays, model)
    if not finite(change.values()):
        raise PayloadError("the change of its variate holds NaN or infinity")
    for name, value in [*((name, arrays[name]) for name in names), *change.items()]:
        if name not in model or model[name].shape != value.shape:
            raise PayloadError(f"its {name!r} is not what was sent")
    if arrays.keys() != model.keys():
        raise PayloadError(
            f"its names differ from the model's: {sorted(arrays.keys() ^ model.keys())}"
        )
