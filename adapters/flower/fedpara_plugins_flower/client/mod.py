"""The mod on the client, which decodes messages and encodes replies."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flwr.app import Context, Message, RecordDict
from torch import nn

from fedpara_plugins import ConfigError, FedParaError, ModelSpec, PayloadError
from fedpara_plugins.codecs import readable
from fedpara_plugins.exchange import ClientRound, LacksFrozenError, OwnModels, ReceivedRecord
from fedpara_plugins.models import rank_hint
from fedpara_plugins.references import LostReferenceError
from fedpara_plugins.support import Storage
from fedpara_plugins_flower.client.arrival import Arrival
from fedpara_plugins_flower.client.exports import export
from fedpara_plugins_flower.client.options import check_plain_message, client_settings
from fedpara_plugins_flower.client.storage import client_state, client_storage
from fedpara_plugins_flower.factories import plain_model_hint
from fedpara_plugins_flower.logs import show_core_logs
from fedpara_plugins_flower.messages import legacy_lists, sixteen_bits
from fedpara_plugins_flower.messages.other_runs import take_other_runs
from fedpara_plugins_flower.messages.records import (
    carried_payload,
    kind_of,
    place_payloads,
    to_tensors,
)
from fedpara_plugins_flower.messages.refusal import refuse_plain_message
from fedpara_plugins_flower.messages.reply_marker import Marker
from fedpara_plugins_flower.privacy import secagg
from fedpara_plugins_flower.privacy.clipping import adds_noise, check_clipping_mods
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

    Where the run's config has the same option, that one wins, but for what keeps values on the
    device: the run can add to ``private`` and take nothing away, a method without a private half
    is refused where this one has one, and ``state_dir`` and ``client_checkpoints`` stay as they
    are here. Give the server the same options:
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
    settings = client_settings(context, options)
    if not settings.active and _carries_payload(message):
        raise ConfigError(
            "the server has a method or codec on, and this client has method and codec none. Give "
            "both sides the same fedpara options"
        )
    if not message.has_content():
        return _answer_error(message, context, call_next, settings)
    if not settings.active:
        check_plain_message(message, context, settings.state_dir)
        with open_run(Run(settings, side="client")):
            return call_next(message, context)
    secagg.check_settings(message, settings)
    payloads = {n: carried_payload(r) for n, r in message.content.array_records.items()}
    if None in payloads.values():
        return refuse_plain_message(message)
    show_core_logs()
    others = take_other_runs(message.content)
    with contextlib.closing(client_storage(context, settings.state_dir, others)) as storage:
        sent = {name: payload for name, payload in payloads.items() if payload is not None}
        return _answer(message, sent, context, call_next, settings, storage)


def _answer_error(
    message: Message, context: Context, call_next: App, settings: FlowerSettings
) -> Message:
    """Let the app answer a message that carries an error, with anything but arrays."""
    with open_run(Run(settings, side="client")):
        reply = call_next(message, context)
    if settings.active and reply.has_content() and reply.content.array_records:
        raise PayloadError(
            "the message carries an error, and the app answers it with arrays, of which nothing "
            "says what is private: answer without arrays"
        )
    return reply


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
    own = OwnModels(settings.config, state.own_models(settings.config))
    built: list[tuple[ModelSpec, nn.Module]] = []
    client_round = ClientRound(
        settings,
        state,
        own=own,
        kind_of=kind_of,
        states=lambda: ((spec, model.state_dict()) for spec, model in built),
    )
    run = Run(
        settings,
        side="client",
        own=own,
        previous_steps=client_round.previous_steps,
        storage=storage,
        starts=legacy_lists.asks_for_parameters(message),
        built=built,
    )
    check = partial(_check_received, message, call_next, settings)
    arrival = Arrival(message, payloads, client_round, run, check)
    try:
        arrival.place()
        reply = _call_app(message, context, call_next, run)
        if reply.has_error() or secagg.is_step_without_arrays(message, reply):
            return reply
        received = arrival.received()
        export(message, context, settings, client_round)
    except LacksFrozenError as error:
        log.info("fedpara: the server is asked for its frozen tensors: %s", error)
        lacking = Marker(lost=True, lacks=[error.record], decoders=readable())
        return Message(lacking.attached_to(RecordDict()), reply_to=message)
    except LostReferenceError as error:
        log.warning("fedpara: the server is asked to send again: %s", error)
        lost = Marker(lost=True, has=client_round.known_hashes(), decoders=readable())
        return Message(lost.attached_to(RecordDict()), reply_to=message)
    _name_arrays(reply, received, run)
    noisy = adds_noise(call_next)
    _encode_in_place(reply, client_round, run, masked=secagg.masks_reply(message), noisy=noisy)
    client_round.keep(steps=max((training.steps for training in run.trainings), default=0))
    # Only now: a round that fails leaves no trace, and one that is killed none or all of it.
    storage.commit()
    return reply


def _check_received(
    message: Message,
    call_next: App,
    settings: FlowerSettings,
    received: Mapping[str, ReceivedRecord],
) -> None:
    """Raise for mods that do not go with what a message holds.

    Raises:
        ConfigError: private values would be masked and sent, or clipping would not hold.
    """
    hidden = any(part.spec.private_keys for part in received.values())
    secagg.check_order(message, private=hidden)
    for part in received.values():
        check_clipping_mods(call_next, settings, {**part.held.tensors, **part.private})


def _name_arrays(reply: Message, received: Mapping[str, ReceivedRecord], run: Run) -> None:
    """Name the arrays of a legacy app's reply, as the client's own model has them.

    Raises:
        ConfigError: no own model is known, and some of the arrays may be private.
        PayloadError: see `legacy_lists.name_reply`.
    """
    if not legacy_lists.answers_with_list(reply):
        return
    named = received.get(legacy_lists.PARAMETERS)
    own = run.own or OwnModels(run.settings.config)
    if named is not None or not own:
        own.check_order_known(named.spec if named else None)
    names = named.user_names if named else None
    specs = run.plain or {frozenset(spec.keys): spec for spec in own.specs}
    legacy_lists.name_reply(reply, names, specs)


def _call_app(message: Message, context: Context, call_next: App, run: Run) -> Message:
    with open_run(run):
        try:
            return call_next(message, context)
        except FedParaError:
            raise
        except Exception as error:
            if (hint := sixteen_bits.hint_of(error)) is not None:
                raise ConfigError(hint) from error
            if (hint := rank_hint(error)) is not None:
                raise ConfigError(hint) from error
            built = run.specs or run.trains_dense
            if not built and any(spec.weights for spec in run.expected):
                raise ConfigError(
                    f"fedpara: the app failed ({error}) and built no converted model, while the "
                    f"server sends one. Add to the client: Net = fedpara.factorised(Net)"
                ) from error
            if (hint := plain_model_hint(error, run)) is not None:
                raise ConfigError(hint) from error
            raise


def _encode_in_place(
    reply: Message, client_round: ClientRound, run: Run, *, masked: bool, noisy: bool
) -> None:
    """Replace the arrays of a reply by what travels, and add the marker.

    Args:
        reply: of the app, its arrays named.
        client_round: the round that it ends.
        run: that the app ran in.
        masked: whether `secaggplus_mod` masks the numbers, which then leave uncoded.
        noisy: whether a mod has added noise to all of them.

    Raises:
        PayloadError: see `ClientRound.prepare_reply` and `ClientRound.encode`.
    """
    records = {
        name: to_tensors(record)
        for name, record in reply.content.array_records.items()
        if not legacy_lists.carries_nothing(record)
    }
    leaving = client_round.prepare_reply(records, start=run.start, noisy=noisy)
    if masked:
        for name, part in leaving.items():
            secagg.take_shared(reply.content, name, part.shared)
    coded = client_round.encode({} if masked else leaving, on_encoded=run.on_encoded)
    place_payloads(reply.content, coded, leaving)
    marker = Marker(
        holds=client_round.received_hashes,
        fresh=client_round.fresh,
        decoders=client_round.decoders,
    )
    reply.content = marker.attached_to(reply.content)
