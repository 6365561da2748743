"""A record's tensors to a payload and back: what both sides of every adapter do alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedpara_plugins.codecs import (
    Codec,
    PayloadHeader,
    decoders,
    encode_with_feedback,
)
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references import same_layout, shared_tensors

__all__ = [
    "blind_limit",
    "check_finite",
    "check_names",
    "codecs_of",
    "decoders_of",
    "difference",
    "encode",
    "fitting",
    "loss_known",
    "own_words",
    "spec_of",
    "update_codec",
]

DECODERS = "decoders"
CODECS = "codecs"

DEFLATE_BOUND = 1100
"""zlib cannot expand by more."""

SMALLEST_BOUND = 2**30
"""Bytes that a message may decode to in any case. A receiver without a model at hand has nothing
that bounds it better, and a message that says "no change" may be smaller than any coder's rate
suggests."""

Tensors = Mapping[str, Tensor]


def encode(
    tensors: Tensors,
    *,
    spec: ModelSpec,
    codec: Codec,
    reference: Tensors | None,
    digest: str | None = None,
    residual: Tensors | None = None,
) -> tuple[bytes, dict[str, Tensor]]:
    """The payload of the shared part of ``tensors``, and what the codec lost of it.

    The header lists the entropy decoders of this side, so that the other may use them.

    Args:
        tensors: by name, private names allowed (they are left out).
        spec: the model they belong to.
        codec: the run's codec.
        reference: what the receiver holds of the same names; without it (or with other names)
            the codec's first-contact chain is used.
        digest: the reference's hash, where the caller knows it.
        residual: what was lost last time, where the codec has error feedback.

    Returns:
        The payload, and the residual for the next one; empty without error feedback.

    Raises:
        MismatchError: names are those of a wrapped model (see `check_names`).
    """
    check_names(spec, tensors, others=True)
    shared = shared_tensors(spec, tensors)
    usable = reference is not None and same_layout(shared, reference)
    return encode_with_feedback(
        shared,
        codec=codec,
        reference=dict(reference) if usable and reference is not None else None,
        digest=digest if usable else None,
        residual=residual,
        model=spec.to_json(),
        extra=own_words(),
    )


def update_codec(codec: Codec) -> Codec:
    """The uplink's chain for tensors that are themselves an update, such as a variate's change.

    There is nothing to take a difference to. Error feedback is left out too: who sends such updates
    is told what was lost of them (`Run.on_encoded`) and keeps what the server has.
    """
    stages = tuple(stage for stage in codec.stages if not stage.needs_reference)
    return replace(codec, stages=stages, feedback=False)


def loss_known(codec: Codec) -> Codec:
    """The same chain, coding the same, of which `encode` also says what was lost."""
    lossy = not all(stage.lossless or stage.needs_reference for stage in codec.stages)
    return replace(codec, feedback=lossy)


def difference(after: Tensors, before: Tensors) -> dict[str, Tensor]:
    """``after - before``, where either has a tensor; a missing one is zero."""
    missing = {name: -value for name, value in before.items() if name not in after}
    both = {n: value - before[n] if n in before else value for n, value in after.items()}
    return both | missing


def fitting(residual: Tensors, tensors: Tensors) -> dict[str, Tensor]:
    """The part of a residual that is added to ``tensors``: another model may have left the rest."""
    return {n: v for n, v in residual.items() if n in tensors and v.shape == tensors[n].shape}


def own_words(codecs: Sequence[str] = ()) -> dict[str, list[str]]:
    """What this side says of itself in a payload's header: the decoders it has.

    Args:
        codecs: its settings, for a receiver that is to compare them with its own; () leaves them
            out.
    """
    words = {DECODERS: list(decoders())}
    return {**words, CODECS: list(codecs)} if codecs else words


def codecs_of(header: PayloadHeader) -> tuple[str, ...]:
    """The codec settings of the sender of a payload; empty where it names none."""
    named = (header.extra or {}).get(CODECS)
    return tuple(map(str, named)) if isinstance(named, list) else ()


def blind_limit(payload: bytes) -> int:
    """Bytes that a payload may decode to, where no model is at hand that bounds it better."""
    return max(DEFLATE_BOUND * len(payload), SMALLEST_BOUND)


def decoders_of(header: PayloadHeader) -> tuple[str, ...]:
    """The entropy decoders that the sender of a payload has."""
    named = (header.extra or {}).get(DECODERS)
    return tuple(map(str, named)) if isinstance(named, list) else ()


def spec_of(header: PayloadHeader, names: Iterable[str], *, limit: int) -> ModelSpec:
    """The model that a payload describes.

    Args:
        header: of the payload.
        names: of its tensors.
        limit: bytes that the private tensors may have.

    Raises:
        PayloadError: it describes none, or an unsound one.
    """
    if header.model is None:
        raise PayloadError("fedpara: the message describes no model; was it made by this plugin?")
    return ModelSpec.from_json(header.model, tuple(names), limit=limit)


def check_names(spec: ModelSpec, tensors: Tensors, *, others: bool = False) -> None:
    """Raise for names of which nobody can say whether they are private.

    A model in a wrapper (`torch.compile`, `DataParallel`) puts its own prefix before every name.
    What stays on the device is known by its name, and would leave it under such a one.

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
        prefix, _, rest = name.partition(".")
        while rest and rest not in known:
            more, _, rest = rest.partition(".")
            prefix = f"{prefix}.{more}"
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


def check_finite(tensors: Tensors) -> None:
    """Raise for the first tensor that holds NaN or infinity.

    Raises:
        PayloadError: names the tensor and counts the values.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise PayloadError(
                f"fedpara: tensor {name!r} holds {bad} NaN or infinite values of {value.numel()}; "
                f"training has diverged; lower the rate, or set the fedpara option clip = 1.0 "
                f"(with local='dense' clip gradients in your own training)"
            )
