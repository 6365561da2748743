"""The decision which tensors may leave a client, for every record of every adapter.

`select_outgoing` decides, and no other function does. It takes what the client's own models say,
and nothing that came with a message. A client encodes nothing but `Outgoing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.exchange.frozen import tensor_hash
from fedpara_plugins.exchange.own_models import OwnModels
from fedpara_plugins.exchange.records import RecordKind, State, plain_spec
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.state_parts import shapes_of

__all__ = ["Outgoing", "check_names", "select_outgoing"]


@dataclass(frozen=True)
class Outgoing:
    """The part of one record that may leave the device.

    Attributes:
        spec: the model that the tensors belong to, for the receiver.
        shared: the tensors by name, none of them private.
        changed: frozen buffers that the client has changed, none of them private either.
    """

    spec: ModelSpec
    shared: State
    changed: State = field(default_factory=dict)


def select_outgoing(
    record: str,
    tensors: Mapping[str, Tensor],
    own: OwnModels,
    *,
    kind: RecordKind = "model",
    received: ModelSpec | None = None,
) -> Outgoing:
    """Return the part of a record that may leave the device.

    Args:
        record: its name.
        tensors: by name; a model's private tensors are left out, and so are those that the message
            received names as frozen.
        own: the client's own models. A side record may hold private tensors of none of them.
        kind: of the record.
        received: the model of the record that this one answers; it counts if it is an own one. A
            record that answers none may hold tensors that have nothing to do with any model.

    Raises:
        PayloadError: a side record holds a private tensor.
        MismatchError: names are those of a wrapped model, or unknown (see `check_names`), or the
            model received is not an own one.
        ConfigError: no own model is known, and there may be private values.
    """
    shapes = shapes_of(tensors)
    if kind != "model" or not own.has_part(tensors, shapes):
        for spec in own.specs:
            check_names(spec, tensors, others=True)
    own.check_named(tensors.keys())
    if kind == "model":
        spec = own.spec_for(shapes, received)
        if received is not None:
            check_names(spec, tensors)
        hidden = own.hidden_names(tensors, spec)
        kept = hidden | set(spec.frozen)
        shared = {k: value for k, value in tensors.items() if k not in kept}
        buffers = {k: tensors[k] for k in spec.buffers if k in tensors and k not in hidden}
        return Outgoing(spec, shared, _changed(spec, buffers))
    own.check_known()
    # Such a record is sent whole, so it must hold nothing private.
    private = own.hidden_names(tensors, plain_spec(()))
    if private:
        raise PayloadError(
            f"fedpara: record {record!r} of the reply holds {min(private)!r}, which stays on the "
            f"device: leave private names out of it"
        )
    return Outgoing(plain_spec(tensors), dict(tensors))


def _changed(spec: ModelSpec, buffers: State) -> State:
    """Return the buffers whose values are not those that the message has named by their hashes."""
    return {k: v for k, v in buffers.items() if tensor_hash(k, v) != spec.frozen[k]}


def check_names(spec: ModelSpec, tensors: Mapping[str, Tensor], *, others: bool = False) -> None:
    """Raise for names that may or may not be private.

    A model in a wrapper (`torch.compile`, `DataParallel`) puts its own prefix before every name.
    Private tensors are recognised by their names, so they would leave the device under such names.

    Args:
        spec: of the model.
        tensors: a state of it, or part of one.
        others: allow tensors that have nothing to do with the model.

    Raises:
        MismatchError: names the first one; or there are composed weights, and private values.
    """
    known = {*spec.keys, *spec.weights}
    for name in tensors:
        if name in spec.weights and spec.private_keys:
            raise MismatchError(
                f"fedpara: the answer holds the composed weight {name!r}, and this client's "
                f"private values are part of such weights: nothing of it is sent. Answer with the "
                f"state of the converted model, model.state_dict()"
            )
        if name in known:
            continue
        prefix, rest = _without_wrappers(name, known)
        if rest:
            raise MismatchError(
                f"fedpara: the answer holds {name!r}, where the model has {rest!r}: it is the "
                f"state of a wrapped model (torch.compile, DataParallel), and nothing of it is "
                f"sent. Answer with the state of the model inside: model.{prefix}.state_dict()"
            )
        if not others:
            raise MismatchError(
                f"fedpara: the answer holds {name!r}, which the model does not have: answer with "
                f"the state of the model that was sent, and send other values in a record of "
                f"their own"
            )


def _without_wrappers(name: str, known: set[str]) -> tuple[str, str]:
    """Split a name into the prefix of wrappers and a known name, which is "" if there is none."""
    prefix, _, rest = name.partition(".")
    while rest and rest not in known:
        more, _, rest = rest.partition(".")
        prefix = f"{prefix}.{more}"
    return prefix, rest
