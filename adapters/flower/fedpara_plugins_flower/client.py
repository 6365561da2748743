"""The client side: a mod that decodes what arrives and encodes what leaves."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.common import Context, Message, RecordDict
from torch import Tensor

from fedpara_plugins import ConfigError, FedParaError, ModelSpec, merge
from fedpara_plugins.checkpoints import save_dense
from fedpara_plugins.codecs import decoders
from fedpara_plugins.references import LostReferenceError, Received
from fedpara_plugins.storage import Storage
from fedpara_plugins_flower.client_state import ClientState, client_storage
from fedpara_plugins_flower.coding import check_finite, decoders_of, encode, spec_of
from fedpara_plugins_flower.logs import show_core_logs
from fedpara_plugins_flower.marker import Marker
from fedpara_plugins_flower.records import (
    carried_payload,
    payload_record,
    to_record,
    to_tensors,
)
from fedpara_plugins_flower.refusal import refuse_plain_message
from fedpara_plugins_flower.run import Run, open_run
from fedpara_plugins_flower.settings import Settings

__all__ = ["client_mod"]

log = logging.getLogger("flwr.fedpara")

App = Callable[[Message, Context], Message]

DEFLATE_BOUND = 1100
"""zlib cannot expand by more."""

SMALLEST_BOUND = 2**30
"""Bytes that a message may decode to in any case. A client has no model at hand that would bound
it better, and a message that says "no change" may be smaller than any coder's rate suggests."""


@dataclass(frozen=True)
class _Received:
    """One record of a message, decoded."""

    spec: ModelSpec
    held: Received
    full: dict[str, Tensor]
    fresh: bool
    decoders: tuple[str, ...]


def client_mod(message: Message, context: Context, call_next: App) -> Message:
    """Decode the message, run the app on ordinary arrays, encode the reply.

    Put it first: ``ClientApp(mods=[fedpara.client_mod, ...])``. Mods after it see what they would
    see without the plugin.

    A server without the plugin gets a reply that ends its run and says why.

    Raises:
        ConfigError: bad options, or the app built no converted model.
        MismatchError: the app builds another model than the server's message describes.
        PayloadError: the message is damaged, or training gave NaN.
    """
    settings = Settings.from_run_config(context.run_config)
    if not settings.active or not message.has_content():
        with open_run(Run(settings, side="client")):
            return call_next(message, context)
    payloads = {n: carried_payload(r) for n, r in message.content.array_records.items()}
    if None in payloads.values():
        return refuse_plain_message(message)
    show_core_logs()
    with contextlib.closing(client_storage(context, settings.state_dir)) as storage:
        sent = {name: payload for name, payload in payloads.items() if payload is not None}
        return _answer(message, sent, context, call_next, settings, storage)


def _answer(
    message: Message,
    payloads: Mapping[str, bytes],
    context: Context,
    call_next: App,
    settings: Settings,
    storage: Storage,
) -> Message:
    state = ClientState(storage)
    try:
        received = {name: _receive(name, payload, state) for name, payload in payloads.items()}
    except LostReferenceError as error:
        log.warning("fedpara: the server is asked to send again: %s", error)
        has = {name: state.references.holds(name) for name in payloads}
        lost = Marker(lost=True, has=has, decoders=decoders())
        return Message(lost.attached_to(RecordDict()), reply_to=message)
    for name, part in received.items():
        message.content[name] = to_record(part.full)
    expected = next((part.spec for part in received.values()), None)
    run = Run(
        settings,
        side="client",
        expected=expected,
        previous_steps=state.steps(),
        storage=storage,
    )
    reply = _call_app(message, context, call_next, run)
    if reply.has_error():
        return reply
    _export(message, context, settings, received)
    encoded = _encode_reply(reply, settings, state, received)
    state.keep_steps(max((training.steps for training in run.trainings), default=0))
    # Only now: a round that fails leaves no trace, and one that is killed none or all of it.
    storage.commit()
    return encoded


def _receive(name: str, payload: bytes, state: ClientState) -> _Received:
    limit = max(DEFLATE_BOUND * len(payload), SMALLEST_BOUND)
    held = state.references.receive(name, payload, limit=limit)
    spec = spec_of(held.header, held.tensors, limit=limit)
    private, fresh = state.private(spec, held.tensors)
    return _Received(
        spec=spec,
        held=held,
        full=merge(spec, held.tensors, private),
        fresh=fresh and bool(private),
        decoders=decoders_of(held.header),
    )


def _call_app(message: Message, context: Context, call_next: App, run: Run) -> Message:
    with open_run(run):
        try:
            return call_next(message, context)
        except FedParaError as error:
            # Flower forwards only the text of an error: it must say whose it is.
            raise type(error)(f"fedpara: {str(error).removeprefix('fedpara: ')}") from error
        except Exception as error:
            if run.expected is not None and run.expected.weights and not run.specs:
                raise ConfigError(
                    f"fedpara: the app failed ({error}) and built no converted model, while the "
                    f"server sends one. Add to the client: Net = fedpara.factorised(Net)"
                ) from error
            raise


def _encode_reply(
    reply: Message, settings: Settings, state: ClientState, received: Mapping[str, _Received]
) -> Message:
    private: dict[str, Tensor] = {}
    outgoing: dict[str, bytes] = {}
    residuals: dict[str, dict[str, Tensor]] = {}
    for name, record in reply.content.array_records.items():
        part = received.get(name) or next(iter(received.values()), None)
        tensors = to_tensors(record)
        check_finite(tensors)
        spec = part.spec if part else ModelSpec(weights={}, keys=tuple(tensors), seed=0)
        reference = received[name].held.tensors if name in received else None
        codec = settings.uplink.resolved(part.decoders if part else None)
        outgoing[name], residuals[name] = encode(
            tensors,
            spec=spec,
            codec=codec,
            reference=reference,
            residual=state.residual(name) if codec.feedback else None,
        )
        if name in received:
            private.update({k: v for k, v in tensors.items() if k in spec.private_keys})
    for name, payload in outgoing.items():
        reply.content[name] = payload_record(payload)
    state.keep_private(private)
    if settings.uplink.feedback:
        for name, residual in residuals.items():
            state.keep_residual(name, residual)
    if settings.downlink.needs_reference:
        for name, part in received.items():
            state.references.keep(name, part.held)
    marker = Marker(
        holds={name: part.held.reference for name, part in received.items()},
        fresh=any(part.fresh for part in received.values()),
        decoders=decoders(),
    )
    reply.content = marker.attached_to(reply.content)
    return reply


def _export(
    message: Message, context: Context, settings: Settings, received: Mapping[str, _Received]
) -> None:
    """Write the client's own dense model, where it lives, each time it has been evaluated."""
    folder = settings.client_checkpoints
    if folder is None or not message.metadata.message_type.startswith("evaluate"):
        return
    who = context.node_config.get("partition-id", context.node_id)
    for part in received.values():
        save_dense(
            folder / f"client-{who}.safetensors",
            part.spec.dense_state(part.full),
            model=f"the own model of client {who}",
            method=settings.config.method,
        )
        return
