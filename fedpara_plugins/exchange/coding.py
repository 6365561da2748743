"""Encoding of a client's record as a payload, and the error that the codec makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedpara_plugins.codecs import Codec, HeaderForm, encode_with_feedback
from fedpara_plugins.exchange.headers import header_extra
from fedpara_plugins.exchange.outgoing import Outgoing
from fedpara_plugins.exchange.records import State
from fedpara_plugins.references import DecodedDownlink, same_layout

__all__ = ["CodedRecord", "encode_record", "update_codec"]


@dataclass(frozen=True)
class CodedRecord:
    """A record as it is sent.

    Attributes:
        payload: the bytes.
        residual: the error that the next payload makes up for; empty without error feedback.
        reference: hash of what the client received, if the payload names it.
        lost: the tensors given minus those that the receiver decodes. Known where the codec has
            error feedback or `encode_record` was asked for it; a tensor that lost nothing is
            missing.
    """

    payload: bytes
    residual: State
    lost: State
    reference: str | None = None


def encode_record(
    record: Outgoing,
    *,
    codec: Codec,
    received: DecodedDownlink | None = None,
    residual: Mapping[str, Tensor] | None = None,
    with_loss: bool = False,
    form: HeaderForm | None = None,
) -> CodedRecord:
    """Encode a record that leaves a client.

    A header of version 1 lists what this side decodes. Version 2 is read by a server that knows it
    from the reply's own fields.

    Args:
        record: what may leave.
        codec: the uplink's chain.
        received: what the client received under the same name, which the server has too. Without
            it, or with other names, shapes or dtypes in it, the chain for a first contact is used.
        residual: what was lost last time, where the codec has error feedback.
        with_loss: find out what is lost even without error feedback.
        form: of the header, for a server that reads version 2; version 1 by default.

    Raises:
        PayloadError: a tensor cannot be encoded.
    """
    usable = received if received and same_layout(record.shared, received.tensors) else None
    payload, rest = encode_with_feedback(
        record.shared,
        codec=_with_known_loss(codec) if with_loss else codec,
        reference=None if usable is None else usable.tensors,
        digest=None if usable is None else usable.reference,
        residual=residual,
        model=record.spec.to_json(),
        extra=header_extra() if form is None else None,
        form=form,
    )
    before = {} if residual is None else _fitting(residual, record.shared)
    named = None if usable is None or not codec.needs_reference else usable.reference
    return CodedRecord(payload, rest, _change(rest, before), named)


def update_codec(codec: Codec) -> Codec:
    """Return the uplink's chain for tensors that are an update already, such as a variate's change.

    An update needs no difference to a reference. Error feedback is left out too: the sender of such
    updates learns what the codec lost, and keeps what the server has.
    """
    stages = tuple(stage for stage in codec.stages if not stage.needs_reference)
    return replace(codec, stages=stages, feedback=False)


def _with_known_loss(codec: Codec) -> Codec:
    """Return a chain that encodes alike and also reports what was lost."""
    lossy = not all(stage.lossless or stage.needs_reference for stage in codec.stages)
    return replace(codec, feedback=lossy)


def _fitting(residual: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> State:
    """Return the part of a residual that applies here; the rest may come from another model."""
    return {n: v for n, v in residual.items() if n in tensors and v.shape == tensors[n].shape}


def _change(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> State:
    """Return ``after - before`` for the names of either; a missing tensor is zero."""
    missing = {name: -value for name, value in before.items() if name not in after}
    both = {n: value - before[n] if n in before else value for n, value in after.items()}
    return both | missing
