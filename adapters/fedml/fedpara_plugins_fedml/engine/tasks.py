"""A client's message: what it is asked to do, decoded; and its answer, encoded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedpara_plugins import ConfigError, MismatchError, ModelSpec, merge
from fedpara_plugins.codecs import Codec
from fedpara_plugins.exchange import (
    ClientState,
    blind_limit,
    check_finite,
    check_names,
    codecs_in_words,
    codecs_of,
    decoders_of,
    difference,
    encode,
    fitting,
    loss_known,
    spec_of,
    update_codec,
)
from fedpara_plugins.references import DecodedDownlink
from fedpara_plugins_fedml.engine.models import no_model
from fedpara_plugins_fedml.messages.envelope import Envelope
from fedpara_plugins_fedml.messages.head import MODEL, Head
from fedpara_plugins_fedml.rules import LocalWork, State

__all__ = ["Task", "encoded", "read_task"]


@dataclass(frozen=True)
class Task:
    """A message, decoded.

    Attributes:
        head: of it.
        received: by record.
        full: the model's state: shared as received, private of this client.
        fresh: the private part is the seeded first one.
    """

    head: Head
    received: Mapping[str, DecodedDownlink]
    full: State
    fresh: bool


def read_task(
    head: Head, envelope: Envelope, kept: ClientState, *, spec: ModelSpec, codecs: tuple[str, str]
) -> Task:
    """Decode a message with what the client keeps.

    Args:
        head: of the message.
        envelope: all of it.
        kept: what the client has from earlier rounds.
        spec: of its model.
        codecs: names of its codecs, up and down.

    Raises:
        LostReferenceError: the client has not what the message was coded against.
        ConfigError: the server codes otherwise.
        MismatchError: the server's model is another, or there is none.
        PayloadError: damaged.
    """
    received = {}
    for name, payload in envelope.payloads.items():
        part = kept.references.receive(name, payload, limit=blind_limit(payload))
        _check_codecs(codecs_of(part.header), codecs)
        received[name] = part
    if MODEL not in received:
        raise MismatchError("the server's message holds no model")
    model = received[MODEL]
    theirs = spec_of(model.header, model.tensors, limit=blind_limit(envelope.payloads[MODEL]))
    spec.check_equal(theirs, here="this client", there="the server")
    private, fresh = kept.private(spec, model.tensors)
    full = merge(spec, model.tensors, private)
    return Task(head, received, full, fresh and bool(private))


def _check_codecs(theirs: tuple[str, ...], mine: tuple[str, str]) -> None:
    """Raise if the two sides code in different ways: each would go on sending whole models."""
    if theirs and theirs != mine:
        raise ConfigError(
            f"the codec differs: this client has {codecs_in_words(mine)}, the server has "
            f"{codecs_in_words(theirs)}. Set the same fedpara_codec in the YAML of both"
        )


def encoded(
    task: Task,
    records: Mapping[str, State],
    work: LocalWork,
    kept: ClientState,
    *,
    spec: ModelSpec,
    codec: Codec,
    updates: Collection[str],
) -> dict[str, bytes]:
    """The payloads of an answer, by record.

    Args:
        task: what is answered: its records are what the answer is coded against.
        records: the tensors.
        work: of the optimizer, which may want to know what the codec lost.
        kept: of the client; gets what error feedback sends later.
        spec: of the model.
        codec: of the uplink.
        updates: names of the records that are differences already.
    """
    payloads: dict[str, bytes] = {}
    lost: dict[str, State] = {}
    resolved = codec.resolved(decoders_of(task.received[MODEL].header))
    for name, tensors in records.items():
        check_finite(tensors)
        if name == MODEL:
            check_names(spec, tensors)
        chain = update_codec(resolved) if name in updates else resolved
        held = task.received.get(name)
        residual = kept.residual(name) if chain.feedback else None
        payloads[name], rest = encode(
            tensors,
            spec=spec if name == MODEL else no_model(tensors),
            codec=chain if work.on_encoded is None else loss_known(chain),
            reference=held.tensors if held else None,
            digest=held.reference if held else None,
            residual=residual,
        )
        lost[name] = difference(rest, fitting(residual or {}, tensors))
        if chain.feedback:
            kept.keep_residual(name, rest)
    if work.on_encoded is not None:
        work.on_encoded(lost)
    return payloads
