"""Checks that both sides agree on stages, reference and model; errors name both sides' values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fedpara_plugins._version import __version__
from fedpara_plugins.codecs.chain import NONE, Codec, codec_from_names
from fedpara_plugins.codecs.header import PayloadHeader
from fedpara_plugins.codecs.plain import plain_tensors
from fedpara_plugins.codecs.reference import reference_hash
from fedpara_plugins.errors import ConfigError, MismatchError, PayloadError
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.plugins import stages as registered_stages
from fedpara_plugins.stages.stage import Stage, Tensors

__all__ = ["check_model", "check_tensors", "codec_from_header", "held_reference"]

HERE, THERE = "this side", "the payload's sender"


def codec_from_header(header: PayloadHeader, stages: Mapping[str, Stage] | None) -> Codec:
    """Return the codec that the header names.

    Args:
        header: of a payload.
        stages: known stages by name; all registered ones if None.

    Raises:
        MismatchError: a stage is not installed here, or the stages form no valid chain.
    """
    if stages is None:
        stages = registered_stages()
    try:
        return codec_from_names([] if header.codec == NONE else header.codec.split("+"), stages)
    except ConfigError as error:
        missing = [name[:40] for name in header.codec.split("+") if name not in stages]
        raise MismatchError(
            f"payload of codec {header.codec[:80]!r} (sender: fedpara-plugins "
            f"{header.plugin_version[:40]}), this side has the stages {', '.join(stages)} "
            f"(fedpara-plugins {__version__}); install the stage's plugin on both sides"
            + (f": missing here is {', '.join(missing[:3])}" if missing else "")
        ) from error


def held_reference(
    header: PayloadHeader,
    codec: Codec,
    reference: Mapping[str, torch.Tensor] | None,
    references: Mapping[str, Mapping[str, torch.Tensor]] | None,
) -> Callable[[], Tensors] | None:
    """Return what loads the tensors that the sender encoded against; None if the codec needs none.

    They may lie in a file. They are loaded when a stage needs them, the last one of a decoder: what
    the stages before have used is free by then.

    Args:
        header: names them by their hash.
        codec: of the payload.
        reference: what this side holds; hashed only if ``references`` lacks it.
        references: more of it, by hash.

    Raises:
        MismatchError: this side does not hold them.
        PayloadError: the codec needs a reference and the header names none.
    """
    if not codec.needs_reference:
        return None
    if header.reference is None:
        raise PayloadError(f"codec {codec.name!r} needs a reference and the header names none")
    wanted, held = header.reference, list(references or ())
    if references is not None and wanted in references:
        return lambda: _loaded(wanted, references)
    if reference is not None:
        mine = plain_tensors(reference)
        held.append(reference_hash(mine))
        if held[-1] == wanted:
            return lambda: mine
    raise _not_held(wanted, held)


def _loaded(wanted: str, references: Mapping[str, Mapping[str, torch.Tensor]]) -> Tensors:
    # One look-up only: the state may lie in a file that turns out to be damaged only now.
    found = references.get(wanted)
    if found is None:
        raise _not_held(wanted, list(references))
    return plain_tensors(found)


def _not_held(wanted: str, held: Sequence[str]) -> MismatchError:
    return MismatchError(
        f"payload coded against reference {wanted[:64]}, this side holds "
        f"{', '.join(held[-3:]) or 'none'}; encode without a reference (first contact) instead"
    )


def check_model(header: PayloadHeader, expect: ModelSpec) -> None:
    """Raise unless the payload is of this model, converted in the same way.

    Raises:
        MismatchError: the models differ, and the message names the first difference; or the payload
            does not describe its model.
        PayloadError: the description is malformed.
    """
    if header.model is None:
        raise MismatchError(
            f"the payload does not describe its model, this side expects the model of "
            f"fingerprint {expect.fingerprint}; encode with model=ModelSpec.of(model).to_json()"
        )
    expect.check_described(header.model, here=HERE, there=THERE)


def check_tensors(
    tensors: Tensors, expect: ModelSpec | None, like: Mapping[str, torch.Tensor] | None
) -> None:
    """Raise unless decoded tensors fit this side's model.

    Args:
        tensors: the decoded tensors.
        expect: gives their names, in order, and the shapes of factors.
        like: gives their names, shapes and dtypes.

    Raises:
        MismatchError: they differ; the message names the first difference with both sides' values.
    """
    if expect is not None:
        _check_names(tensors, expect.shared_keys)
        for name, shape in expect.shared_shapes().items():
            _check_same(name, "shape", shape, tuple(tensors[name].shape))
    if like is not None:
        _check_names(tensors, tuple(like))
        for name, other in like.items():
            _check_same(name, "shape", tuple(other.shape), tuple(tensors[name].shape))
            _check_same(name, "dtype", other.dtype, tensors[name].dtype)


def _check_names(tensors: Tensors, wanted: tuple[str, ...]) -> None:
    if tuple(tensors) == wanted:
        return
    missing = [name for name in wanted if name not in tensors]
    known = set(wanted)
    unknown = [name[:80] for name in tensors if name not in known]
    if missing or unknown:
        raise MismatchError(
            f"{HERE} expects {len(wanted)} tensors, {THERE} sent {len(tensors)}: missing "
            f"{missing[:5]}, not expected {unknown[:5]}; both sides need the same model"
        )
    place = next(i for i, pair in enumerate(zip(tensors, wanted, strict=True)) if len({*pair}) > 1)
    raise MismatchError(
        f"the order of the tensors differs: at place {place} {HERE} has {wanted[place]!r}, "
        f"{THERE} {list(tensors)[place]!r}; both sides need the same model"
    )


def _check_same(name: str, what: str, here: object, there: object) -> None:
    if here != there:
        raise MismatchError(
            f"tensor {name!r}: {HERE} has {what} {here}, {THERE} has {there}; both sides need the "
            "same model, converted with the same fedpara options"
        )
