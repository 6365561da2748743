"""The mod on the client, which decodes messages and encodes replies."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.codecs import decoders
from fedpara_plugins.exchange import ClientRound
from fedpara_plugins.references import LostReferenceError
from fedpara_plugins.support import Storage
from fedpara_plugins_flower.client.exports import export
from fedpara_plugins_flower.client.storage import client_state, client_storage
from fedpara_plugins_flower.factories import plain_model_hint
from fedpara_plugins_flower.logs import show_core_logs
from fedpara_plugins_flower.messages import legacy_lists
from fedpara_plugins_flower.messages.records import (
    carried_payload,
    kind_of,
    payload_record,
    to_record,
    to_tensors,
)
from fedpara_plugins_flower.messages.refusal import refuse_plain_message
from fedpara_plugins_flower.messages.reply_marker import Marker
from fedpara_plugins_flower.privacy import secagg
from fedpara_plugins_flower.privacy.clipping import check_clipping_mods
from fedpara_plugins_flower.run import Run, open_run
from fedpara_plugins_flower.settings import FlowerSettings

__all__ = ["client_mod", "client_mod_with"]

log = logging.getLogger("flwr.fedpara")

App = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, App], Message]


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
    return _run(message, context, call_next, {})


def client_mod_with(**options: Any) -> Mod:
    """Return `client_mod` with options set in Python, for ``run_simulation`` without a config.

    Where the run's config has the same option, that one wins. Give the server the same ones:
    ``fedpara.server_app(app, method="fedpara", gamma=0.1)``.

    Args:
        options: those of the section ``[tool.flwr.app.config.fedpara]``.

    Raises:
        ConfigError: unknown option, or a value out of range.
    """
    FlowerSettings.from_run_config({}, options)
    return partial(_run, options=options)


def _run(message: Message, context: Context, call_next: App, options: Mapping[str, Any]) -> Message:
    try:
        return _begin(message, context, call_next, options)
    except FedParaError as error:
        # Flower forwards only the text of an error: it must say whose it is.
        raise type(error)(f"fedpara: {str(error).removeprefix('fedpara: ')}") from error


def _begin(
    message: Message, context: Context, call_next: App, options: Mapping[str, Any]
) -> Message:
    settings = FlowerSettings.from_run_config(context.run_config, options)
    if not settings.active and _carries_payload(message):
        raise ConfigError(
            "the server has a method or codec on, and this client has method and codec none. Give "
            "both sides the same fedpara options"
        )
    if not settings.active or not message.has_content():
        with open_run(Run(settings, side="client")):
            return call_next(message, context)
    secagg.check_settings(message, settings)
    payloads = {n: carried_payload(r) for n, r in message.content.array_records.items()}
    if None in payloads.values():
        return refuse_plain_message(message)
    show_core_logs()
    with contextlib.closing(client_storage(context, settings.state_dir)) as storage:
        sent = {name: payload for name, payload in payloads.items() if payload is not None}
        return _answer(message, sent, context, call_next, settings, storage)


def _carries_payload(message: Message) -> bool:
    return message.has_content() and any(
        carried_payload(record) is not None for record in message.content.array_records.values()
    )


def _answer(
    message: Message,
    payloads: Mapping[str, bytes],
    context: Context,
    call_next: App,
    settings: FlowerSettings,
    storage: Storage,
) -> Message:
    state = client_state(context, settings.state_dir, storage)
    client_round = ClientRound(settings, state, kind_of=kind_of)
    try:
        received = client_round.receive(payloads)
    except LostReferenceError as error:
        log.warning("fedpara: the server is asked to send again: %s", error)
        lost = Marker(lost=True, has=client_round.known_hashes(), decoders=decoders())
        return Message(lost.attached_to(RecordDict()), reply_to=message)
    for name, part in received.items():
        check_clipping_mods(call_next, settings, part.user_tensors)
        message.content[name] = to_record(part.user_tensors)
    legacy_lists.unname_request(message)
    run = _run_of(message, client_round, settings, storage)
    reply = _call_app(message, context, call_next, run)
    if reply.has_error() or secagg.is_step_without_app(message):
        return reply
    named = received.get(legacy_lists.PARAMETERS)
    names = tuple(named.user_tensors) if named else None
    legacy_lists.name_reply(reply, names, run.plain or run.specs)
    export(message, context, settings, client_round)
    _encode_in_place(reply, client_round, run, masked=secagg.masks_reply(message))
    client_round.keep(steps=max((training.steps for training in run.trainings), default=0))
    # Only now: a round that fails leaves no trace, and one that is killed none or all of it.
    storage.commit()
    return reply


def _run_of(
    message: Message,
    client_round: ClientRound,
    settings: FlowerSettings,
    storage: Storage,
) -> Run:
    """Return the run around the app.

    Raises:
        ConfigError: private values would be masked and sent.
    """
    expected = client_round.models[0].spec if client_round.models else None
    secagg.check_order(message, private=expected is not None and bool(expected.private_keys))
    return Run(
        settings,
        side="client",
        expected=expected,
        previous_steps=client_round.previous_steps,
        storage=storage,
        starts=legacy_lists.asks_for_parameters(message),
    )


def _call_app(message: Message, context: Context, call_next: App, run: Run) -> Message:
    with open_run(run):
        try:
            return call_next(message, context)
        except FedParaError:
            raise
        except Exception as error:
            built = run.specs or run.trains_dense
            if run.expected is not None and run.expected.weights and not built:
                raise ConfigError(
                    f"fedpara: the app failed ({error}) and built no converted model, while the "
                    f"server sends one. Add to the client: Net = fedpara.factorised(Net)"
                ) from error
            if (hint := plain_model_hint(error, run)) is not None:
                raise ConfigError(hint) from error
            raise


def _encode_in_place(reply: Message, client_round: ClientRound, run: Run, *, masked: bool) -> None:
    """Replace the arrays of a reply by what travels, and add the marker.

    Args:
        reply: of the app, its arrays named.
        client_round: the round that it ends.
        run: that the app ran in.
        masked: whether `secaggplus_mod` masks the numbers, which then leave uncoded.

    Raises:
        PayloadError: see `ClientRound.prepare_reply` and `ClientRound.encode`.
    """
    records = {
        name: to_tensors(record)
        for name, record in reply.content.array_records.items()
        if not legacy_lists.carries_nothing(record)
    }
    leaving = client_round.prepare_reply(records, built=run.specs, start=run.start)
    if masked:
        for name, part in leaving.items():
            secagg.take_shared(reply.content, name, part.shared)
    coded = client_round.encode({} if masked else leaving, on_encoded=run.on_encoded)
    for name, payload in coded.items():
        reply.content[name] = payload_record(payload)
    marker = Marker(
        holds=client_round.received_hashes, fresh=client_round.fresh, decoders=decoders()
    )
    reply.content = marker.attached_to(reply.content)
