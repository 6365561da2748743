"""The payload: encoded tensors and one versioned header that says how they are encoded.

``docs/payload.md`` specifies the format. This module joins its parts: a codec maps tensors to
encoded tensors and notes, the header describes them, and the container is one file of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fedpara_plugins._version import __version__
from fedpara_plugins.codecs.agreement import (
    check_model,
    check_tensors,
    codec_from_header,
    held_reference,
)
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.codecs.compact import is_compact, open_compact, peek_compact, write_compact
from fedpara_plugins.codecs.container import (
    CHECKSUM_BLANK,
    Container,
    load_tensors,
    open_container,
    write_container,
)
from fedpara_plugins.codecs.description import Description, HeaderForm
from fedpara_plugins.codecs.header import (
    FORMAT_VERSION,
    PayloadHeader,
    header_text,
    parse_header,
    version_hint,
)
from fedpara_plugins.codecs.joint import JOINT
from fedpara_plugins.codecs.plain import plain_tensors, unshared
from fedpara_plugins.codecs.reference import digest_of
from fedpara_plugins.errors import PayloadError, TooLargeError
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.stages.entropy_decoders import decoders
from fedpara_plugins.stages.handed_over import HandedOver, working_limit
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_limit

__all__ = [
    "COMPACT",
    "ChosenCodec",
    "DecodedPayload",
    "OpenedPayload",
    "PayloadHeader",
    "choose_codec",
    "decode_payload",
    "encode_payload",
    "open_payload",
    "peek_header",
    "readable",
    "write_payload",
]

COMPACT = "payload2"
"""How a side says, among what it can decode, that it reads headers of version 2."""

_ADDED = 3
"""Tensors that stages may add to those of the sender."""


@dataclass(frozen=True)
class DecodedPayload:
    """The tensors of a payload, in the sender's order, each with memory of its own; and its header.

    Attributes:
        tensors: by name.
        header: of the payload.
    """

    tensors: Tensors
    header: PayloadHeader


class ChosenCodec(NamedTuple):
    """What a payload is encoded with.

    Attributes:
        codec: has an entropy coder, and needs a reference only if there is one.
        reference: the tensors to encode against, as stages take them; None if it needs none.
        digest: their `reference_hash`.
    """

    codec: Codec
    reference: Tensors | None
    digest: str | None


def encode_payload(
    tensors: Mapping[str, torch.Tensor],
    *,
    codec: Codec,
    reference: Mapping[str, torch.Tensor] | None = None,
    digest: str | None = None,
    model: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    form: HeaderForm | None = None,
) -> bytes:
    """Encode named tensors as bytes.

    Args:
        tensors: dense, of a dtype in `stages.dtypes.DTYPES`; neither modified nor kept.
        codec: if it needs a reference and none is given, ``codec.first_contact()`` is used. The
            word ``entropy`` means zlib here; ``codec.resolved`` chooses a better coder.
        reference: tensors that the receiver holds too; their hash covers all of them.
        digest: `reference_hash` of ``reference``, if the caller knows it: hashing takes a fifth of
            the time. It is not checked; with a wrong one the receiver refuses the payload, or
            decodes it against another state.
        model: JSON for the receiver to compare with its own model.
        extra: any other JSON of the caller.
        form: of a header of version 2, for a receiver that reads it; version 1 by default.

    Raises:
        PayloadError: a tensor or ``model`` or ``extra`` cannot be sent, or the digest is no hash.
        MismatchError: the reference does not fit the tensors.
    """
    codec, against, named = choose_codec(codec, reference, digest)
    coded, notes = codec.encode(plain_tensors(tensors), reference=against)
    return write_payload(
        coded, notes, codec=codec, reference=named, model=model, extra=extra, form=form
    )


def choose_codec(
    codec: Codec, reference: Mapping[str, torch.Tensor] | None, digest: str | None
) -> ChosenCodec:
    """Return the codec to use with this reference, and the reference as it uses it.

    Args:
        codec: as for `encode_payload`.
        reference: as for `encode_payload`.
        digest: as for `encode_payload`.

    Raises:
        PayloadError: a tensor of the reference cannot be sent, or the digest is no hash.
    """
    codec = codec.resolved(None)
    if codec.needs_reference and reference is None:
        codec = codec.first_contact()
    if not codec.needs_reference or reference is None:
        return ChosenCodec(codec, None, None)
    against = plain_tensors(reference)
    return ChosenCodec(codec, against, digest_of(against, digest))


def write_payload(
    coded: Tensors,
    notes: Sequence[Notes],
    *,
    codec: Codec,
    reference: str | None,
    model: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None,
    form: HeaderForm | None = None,
) -> bytes:
    """Return the payload of what ``codec.encode`` returned.

    Args:
        coded: the encoded tensors.
        notes: the notes of each stage.
        codec: the codec in use.
        reference: hash of the reference in use.
        model: as for `encode_payload`.
        extra: as for `encode_payload`.
        form: as for `encode_payload`.

    Raises:
        PayloadError: a tensor or ``model`` or ``extra`` cannot be sent.
    """
    fields = {
        "plugin": __version__,
        "codec": codec.stage_names,
        "reference": reference,
        "model": model,
        "extra": extra,
    }
    if form is not None:
        return write_compact(coded, {**fields, "notes": list(notes)}, form)
    header = {
        "crc32": CHECKSUM_BLANK,  # first, so that it is found without parsing
        "version": FORMAT_VERSION,
        **fields,
        "order": _order(coded),
        "notes": list(notes),
    }
    return write_container(unshared(coded), header_text(header))


def decode_payload(
    data: bytes,
    *,
    reference: Mapping[str, torch.Tensor] | None = None,
    references: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    limit: int,
    stages: Mapping[str, Stage] | None = None,
    expect: ModelSpec | None = None,
    like: Mapping[str, torch.Tensor] | None = None,
    most_tensors: int | None = None,
    descriptions: Mapping[str, Description] | None = None,
) -> DecodedPayload:
    """Decode bytes that anyone may have sent.

    Args:
        data: what `encode_payload` returned.
        reference: tensors that this side holds; their hash is computed if it is needed.
        references: tensors by their hash, if this side holds several states.
        limit: bytes that the tensors may have, in the container and after each stage; set it to the
            bytes of this side's own model. Everything that decoding allocates, the tensors
            included, takes at most one and a half times as much, and 10 MiB.
        stages: known stages by name; all registered ones if None.
        expect: this side's model. The payload must describe the same model, which is checked before
            any tensor is decoded, and hold its shared tensors and no others.
        like: this side's tensors; the decoded ones must have the same names in the same order, and
            the same shapes and dtypes.
        most_tensors: number of tensors that there may be. Each takes some 0.1 ms, however small it
            is, so set it where this side knows how many to expect.
        descriptions: those that this side holds, by hash, for headers of version 2.

    Raises:
        MismatchError: the payload is sound, but of another format version, another model, a stage
            that is not installed here, or a reference or description that this side does not hold.
        PayloadError: anything else is wrong; no other error passes.
    """
    opened = open_payload(data, limit=limit, most_tensors=most_tensors, descriptions=descriptions)
    return opened.decode(
        reference=reference, references=references, stages=stages, expect=expect, like=like
    )


@dataclass(frozen=True)
class OpenedPayload:
    """A payload whose header is read and whose tensors are not.

    Attributes:
        header: of the payload.
        container: the file.
        limit: bytes that the tensors may have.
    """

    header: PayloadHeader
    container: Container
    limit: int

    def decode(
        self,
        *,
        reference: Mapping[str, torch.Tensor] | None = None,
        references: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
        stages: Mapping[str, Stage] | None = None,
        expect: ModelSpec | None = None,
        like: Mapping[str, torch.Tensor] | None = None,
        working: int | None = None,
        borrowed: bool = False,
    ) -> DecodedPayload:
        """Return what `decode_payload` returns for the same arguments.

        Args:
            reference: as there.
            references: as there.
            stages: as there.
            expect: as there.
            like: as there.
            working: bytes that decoding may take; one and a half times the limit, and 10 MiB, if
                None.
            borrowed: whether tensors may lie in the payload's own bytes, which nobody may change.

        Raises:
            MismatchError: as there.
            PayloadError: as there.
        """
        header, limit = self.header, self.limit
        if expect is not None:
            check_model(header, expect)
        codec = codec_from_header(header, stages)
        against = held_reference(header, codec, reference, references)
        working = working_limit(limit) if working is None else working
        coded = load_tensors(self.container, header.order, working=working - self.container.cost)
        try:
            decoded = codec.decode(coded, header.notes, reference=against, limit=limit)
        except PayloadError as error:
            hint = version_hint(header.plugin_version)
            if type(error) is not PayloadError or not hint:
                raise
            raise PayloadError(f"{error}{hint}") from error
        size = sum(tensor.nbytes for tensor in decoded.values())
        check_limit(size, limit, "the tensors")
        check_tensors(decoded, expect, like)
        return DecodedPayload(decoded if borrowed else _own(decoded), header)


def open_payload(
    data: bytes,
    *,
    limit: int,
    most_tensors: int | None = None,
    descriptions: Mapping[str, Description] | None = None,
) -> OpenedPayload:
    """Check a payload as a whole, and read its header, for a caller that needs it first.

    Args:
        data: as for `decode_payload`.
        limit: as for `decode_payload`.
        most_tensors: as for `decode_payload`.
        descriptions: as for `decode_payload`.

    Raises:
        LostDescriptionError: the header refers to a description that this side does not hold.
        MismatchError: another format version.
        PayloadError: not a payload, a damaged one, or one that exceeds a limit.
    """
    container, header = _opened(data, limit, descriptions)
    if most_tensors is not None:
        _check_tensor_count(container, header, most_tensors)
    return OpenedPayload(header, container, limit)


def _opened(
    data: bytes, limit: int | None, descriptions: Mapping[str, Description] | None
) -> tuple[Container, PayloadHeader]:
    if is_compact(data):
        return open_compact(data, limit, descriptions)
    container = open_container(data, limit)
    return container, parse_header(container.header)


def _check_tensor_count(container: Container, header: PayloadHeader, most: int) -> None:
    layouts = [note.get("names") for note in header.notes]
    counts = [len(names) for names in layouts if isinstance(names, list)]
    found = max([len(container.table), *counts])
    # Stages add tensors of steps, escaped values and gaps.
    if found > most + _ADDED:
        raise TooLargeError(
            f"the payload holds {found} tensors, this side expects at most {most}: it is of "
            "another model, or forged"
        )


def _own(tensors: Tensors) -> Tensors:
    """Return the tensors, with copies in place of those that lie in the payload's bytes."""
    if not isinstance(tensors, HandedOver):
        return tensors
    return {
        name: tensor.clone() if tensors.is_lent(tensor) else tensor
        for name, tensor in tensors.items()
    }


def peek_header(
    data: bytes,
    *,
    limit: int | None = None,
    descriptions: Mapping[str, Description] | None = None,
) -> PayloadHeader:
    """Return the header of a payload, after verifying the checksum, without decoding a tensor.

    Args:
        data: what `encode_payload` returned.
        limit: bytes that the tensors may have, as for `decode_payload`, which bounds the header
            too. None allows any header of 4 MiB.
        descriptions: as for `decode_payload`. Without them, a header that refers to a description
            comes without what it takes from there: the model, the order, names and shapes in notes.

    Raises:
        MismatchError: another format version, or a description that is not among those given.
        PayloadError: not a payload, or a damaged one.
    """
    if descriptions is None and is_compact(data):
        return peek_compact(data, limit)
    return _opened(data, limit, descriptions)[1]


def readable() -> tuple[str, ...]:
    """Return what this side says that it can decode: entropy stages, headers, joint payloads.

    Releases that know none but version 1 pass over names that they do not know.
    """
    return (*decoders(), COMPACT, JOINT)


def _order(tensors: Tensors) -> list[int] | None:
    places = {name: place for place, name in enumerate(sorted(tensors))}
    order = [places[name] for name in tensors]
    return None if order == sorted(order) else order
