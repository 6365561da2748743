"""The client side: a mod that decodes what arrives and encodes what leaves."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from flwr.common import Context, Message, RecordDict
from torch import Tensor

from fedpara_plugins import ConfigError, FedParaError, ModelSpec, PayloadError, merge
from fedpara_plugins.codecs import decoders
from fedpara_plugins.exchange import (
    ClientState,
    DenseRound,
    blind_limit,
    check_agreement,
    check_finite,
    check_names,
    codecs_in_words,
    codecs_of,
    decoders_of,
    difference,
    encode,
    fitting,
    loss_known,
    private_key,
    spec_of,
    tell_idle,
    update_codec,
)
from fedpara_plugins.models import save_dense
from fedpara_plugins.references import DecodedDownlink, LostReferenceError, shared_tensors
from fedpara_plugins.support import Storage
from fedpara_plugins_flower.client.storage import client_state, client_storage
from fedpara_plugins_flower.factories import plain_model_hint
from fedpara_plugins_flower.logs import show_core_logs
from fedpara_plugins_flower.messages import legacy_lists as positional
from fedpara_plugins_flower.messages.records import (
    carried_payload,
    is_side,
    payload_record,
    to_record,
    to_tensors,
)
from fedpara_plugins_flower.messages.refusal import refuse_plain_message
from fedpara_plugins_flower.messages.reply_marker import Marker
from fedpara_plugins_flower.privacy import secagg
from fedpara_plugins_flower.privacy.clipping import check_clipping_mods
from fedpara_plugins_flower.run import Run, open_run
from fedpara_plugins_flower.settings import Settings

__all__ = ["client_mod", "client_mod_with"]

log = logging.getLogger("flwr.fedpara")

App = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, App], Message]


@dataclass(frozen=True)
class _Received:
    """One record of a message, decoded."""

    spec: ModelSpec
    held: DecodedDownlink
    full: dict[str, Tensor]
    fresh: bool
    decoders: tuple[str, ...]
    dense: DenseRound | None = None

    @property
    def given(self) -> dict[str, Tensor]:
        """What the app gets."""
        return self.full if self.dense is None else self.dense.dense

    def taken(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is answered, from what the app answers."""
        return tensors if self.dense is None else self.dense.after(tensors)


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
    """`client_mod` with options set in Python, for ``run_simulation``, whose config is empty.

    Where the run's config has the same option, that one wins. Give the server the same ones:
    ``fedpara.server_app(app, method="fedpara", gamma=0.1)``.

    Args:
        options: those of the section ``[tool.flwr.app.config.fedpara]``.

    Raises:
        ConfigError: unknown option, or a value out of range.
    """
    Settings.from_run_config({}, options)
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
    settings = Settings.from_run_config(context.run_config, options)
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
    settings: Settings,
    storage: Storage,
) -> Message:
    state = client_state(context, settings.state_dir, storage)
    try:
        received = {
            name: _receive(name, payload, state, settings) for name, payload in payloads.items()
        }
    except LostReferenceError as error:
        log.warning("fedpara: the server is asked to send again: %s", error)
        has = {name: state.references.holds(name) for name in payloads}
        lost = Marker(lost=True, has=has, decoders=decoders())
        return Message(lost.attached_to(RecordDict()), reply_to=message)
    for name, part in received.items():
        check_clipping_mods(call_next, settings, part.given)
        message.content[name] = to_record(part.given)
    positional.unname_request(message)
    expected = next((part.spec for name, part in received.items() if not is_side(name)), None)
    secagg.check_order(message, private=expected is not None and bool(expected.private_keys))
    run = Run(
        settings,
        side="client",
        expected=expected,
        previous_steps=state.steps(),
        storage=storage,
        starts=positional.asks_for_parameters(message),
    )
    reply = _call_app(message, context, call_next, run)
    if reply.has_error() or secagg.is_step_without_app(message):
        return reply
    named = received.get(positional.PARAMETERS)
    names = tuple(named.given) if named else None
    positional.name_reply(reply, names, run.plain or run.specs)
    _export(message, context, settings, received)
    masked = secagg.masks_reply(message)
    encoded = _encode_reply(reply, settings, state, received, run, masked=masked)
    state.keep_steps(max((training.steps for training in run.trainings), default=0))
    # Only now: a round that fails leaves no trace, and one that is killed none or all of it.
    storage.commit()
    return encoded


def _receive(name: str, payload: bytes, state: ClientState, settings: Settings) -> _Received:
    limit = blind_limit(payload)
    held = state.references.receive(name, payload, limit=limit)
    _check_codecs(codecs_of(held.header), settings)
    spec = spec_of(held.header, held.tensors, limit=limit)
    private, fresh = state.private(spec, held.tensors)
    full = merge(spec, held.tensors, private)
    dense = None
    if settings.trains_dense and not is_side(name):
        check_agreement(spec, settings.config)
        tell_idle(settings.config)
        dense = DenseRound(spec, full)
    return _Received(
        spec=spec,
        held=held,
        full=full,
        fresh=fresh and bool(private),
        decoders=decoders_of(held.header),
        dense=dense,
    )


def _check_codecs(theirs: tuple[str, ...], settings: Settings) -> None:
    """Raise if the two sides code in different ways: each would go on sending whole models."""
    mine = settings.codec_names
    if theirs and theirs != mine:
        raise ConfigError(
            f"the codec differs: this client has {codecs_in_words(mine)}, the server has "
            f"{codecs_in_words(theirs)}. Set the same fedpara option codec on both sides"
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


def _encode_reply(
    reply: Message,
    settings: Settings,
    state: ClientState,
    received: Mapping[str, _Received],
    run: Run,
    *,
    masked: bool,
) -> Message:
    private: dict[str, tuple[str, ModelSpec, dict[str, Tensor]]] = {}
    in_clear: dict[str, dict[str, Tensor]] = {}
    outgoing: dict[str, bytes] = {}
    residuals: dict[str, dict[str, Tensor]] = {}
    kept: list[str] = []
    lost: dict[str, dict[str, Tensor]] = {}
    models = [part for name, part in received.items() if not is_side(name)]
    for name, record in reply.content.array_records.items():
        if positional.carries_nothing(record):
            continue
        part = received.get(name) or next(iter(models), None)
        tensors = to_tensors(record)
        check_finite(tensors)
        if not is_side(name):
            tensors = _projected(tensors, part, run)
        spec = part.spec if part else _built_spec(run.specs, tensors)
        if is_side(name):
            _check_shared_only(name, tensors, models)
            spec = ModelSpec(weights={}, keys=tuple(tensors), seed=0)
        if name in received:
            check_names(spec, tensors)
            own = {k: v for k, v in tensors.items() if k in spec.private_keys}
            _check_one_state(name, own, private.get(private_key(spec)))
            if own:
                private[private_key(spec)] = name, spec, own
        if masked:
            check_names(spec, tensors, others=True)
            in_clear[name] = shared_tensors(spec, tensors)
            continue
        held = received[name].held if name in received else None
        codec = settings.uplink.resolved(part.decoders if part else None)
        if is_side(name):
            codec = update_codec(codec)
        residual = state.residual(name) if codec.feedback else None
        outgoing[name], residuals[name] = encode(
            tensors,
            spec=spec,
            codec=codec if run.on_encoded is None else loss_known(codec),
            reference=held.tensors if held else None,
            digest=held.reference if held else None,
            residual=residual,
        )
        lost[name] = difference(residuals[name], fitting(residual or {}, tensors))
        if codec.feedback:
            kept.append(name)
    for name, shared in in_clear.items():
        secagg.take_shared(reply.content, name, shared)
    for name, payload in outgoing.items():
        reply.content[name] = payload_record(payload)
    if run.on_encoded is not None:
        run.on_encoded(lost)
    for _, spec, own in private.values():
        state.keep_private(spec, own)
    for name in kept:
        state.keep_residual(name, residuals[name])
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


def _projected(tensors: dict[str, Tensor], part: _Received | None, run: Run) -> dict[str, Tensor]:
    """The state of factors that an app's answer stands for; itself where factors are trained."""
    if part is not None:
        found = part.taken(tensors)
    else:
        found = tensors if run.start is None else run.start.after(tensors)
    if found is not tensors:
        check_finite(found)
    return found


def _built_spec(
    built: Mapping[frozenset[str], ModelSpec], tensors: Mapping[str, Tensor]
) -> ModelSpec:
    """The model that an answer is about which nobody sent: private names must not leave here."""
    for spec in (built.get(frozenset(tensors)), *built.values()):
        if spec is not None and set(tensors) <= set(spec.keys):
            return spec
    for spec in built.values():
        check_names(spec, tensors, others=True)
    return ModelSpec(weights={}, keys=tuple(tensors), seed=0)


def _check_one_state(
    name: str,
    own: Mapping[str, Tensor],
    other: tuple[str, ModelSpec, Mapping[str, Tensor]] | None,
) -> None:
    """A client has one private state of a model, however many records of it a reply holds."""
    earlier, values = ("", {}) if other is None else (other[0], other[2])
    unlike = [k for k, v in own.items() if k in values and not torch.equal(v, values[k])]
    if unlike or (values and own and values.keys() != own.keys()):
        raise PayloadError(
            f"fedpara: records {earlier!r} and {name!r} of the reply are of one model, and their "
            f"private values differ{f' in {unlike[0]!r}' if unlike else ''}: this client can keep "
            f"one of them. Answer with private names in the trained record alone "
            f"(fedpara_plugins.split(model).shared for the other)"
        )


def _check_shared_only(
    name: str, tensors: Mapping[str, Tensor], models: Sequence[_Received]
) -> None:
    """Nothing is held back from such a record, so nothing private may be in it."""
    private = [key for key in tensors for part in models if key in part.spec.private_keys]
    if private:
        raise PayloadError(
            f"fedpara: record {name!r} of the reply holds {private[0]!r}, which stays on the "
            f"device: leave private names out of it"
        )


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
