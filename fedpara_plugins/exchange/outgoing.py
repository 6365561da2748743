"""The decision which tensors may leave a client, for every record of every adapter.

`outgoing` decides, and no other function does. It uses the models that the caller names as the
client's own, and nothing that came with a message. A client encodes nothing but `Outgoing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.exchange.records import RecordKind, State, plain_spec
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references import shared_tensors

__all__ = ["Outgoing", "check_names", "select_outgoing", "spec_among"]


@dataclass(frozen=True)
class Outgoing:
    """The part of one record that may leave the device.

    Attributes:
        spec: the model that the tensors belong to, for the receiver.
        shared: the tensors by name, none of them private.
    """

    spec: ModelSpec
    shared: State


def select_outgoing(
    record: str,
    tensors: Mapping[str, Tensor],
    models: Sequence[ModelSpec],
    *,
    kind: RecordKind = "model",
    others: bool = False,
) -> Outgoing:
    """Return the part of a record that may leave the device.

    Args:
        record: its name.
        tensors: by name; a model's private tensors are left out.
        models: the client's own. A record of kind ``model`` belongs to the first one, and a side
            record may hold private tensors of none of them.
        kind: of the record.
        others: allow tensors that have nothing to do with the model.

    Raises:
        PayloadError: a side record holds a private tensor.
        MismatchError: names are those of a wrapped model, or unknown (see `check_names`).
    """
    if kind == "model":
        spec = models[0]
        check_names(spec, tensors, others=others)
        return Outgoing(spec, shared_tensors(spec, tensors))
    # Such a record is sent whole, so it must hold nothing private.
    private = [key for key in tensors for spec in models if key in spec.private_keys]
    if private:
        raise PayloadError(
            f"fedpara: record {record!r} of the reply holds {private[0]!r}, which stays on the "
            f"device: leave private names out of it"
        )
    return Outgoing(plain_spec(tensors), dict(tensors))


def check_names(spec: ModelSpec, tensors: Mapping[str, Tensor], *, others: bool = False) -> None:
    """Raise for names that may or may not be private.

    A model in a wrapper (`torch.compile`, `DataParallel`) puts its own prefix before every name.
    Private tensors are recognised by their names, so they would leave the device under such names.

    Args:
        spec: of the model.
        tensors: a state of it, or part of one.
        others: allow tensors that have nothing to do with the model.

    Raises:
        MismatchError: names the first one.
    """
    known = {*spec.keys, *spec.weights}
    for name in tensors:
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


def spec_among(
    built: Mapping[frozenset[str], ModelSpec], tensors: Mapping[str, Tensor]
) -> ModelSpec:
    """Return the one of a client's own models that a state belongs to.

    Args:
        built: the models that the client has built, by their set of names.
        tensors: a state of one of them, or part of one.

    Returns:
        A spec without private names if the state has nothing to do with any of them.

    Raises:
        MismatchError: names are those of a wrapped model.
    """
    for spec in (built.get(frozenset(tensors)), *built.values()):
        if spec is not None and set(tensors) <= set(spec.keys):
            return spec
    for spec in built.values():
        check_names(spec, tensors, others=True)
    return plain_spec(tensors)
