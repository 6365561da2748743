"""The payload: a safetensors file whose metadata holds one versioned header.

The format is specified in ``docs/payload.md``. What is here joins its parts: a codec turns tensors
into tensors and notes, the header says which, the container makes one file of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedpara_plugins._version import __version__
from fedpara_plugins.codecs.agreement import (
    check_model,
    check_tensors,
    codec_of,
    held_reference,
)
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.codecs.container import (
    CHECKSUM_BLANK,
    load_tensors,
    open_container,
    write_container,
)
from fedpara_plugins.codecs.header import (
    FORMAT_VERSION,
    PayloadHeader,
    header_text,
    other_version,
    parse_header,
)
from fedpara_plugins.codecs.plain import plain, unshared
from fedpara_plugins.codecs.reference import digest_of
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, byte_size, check_limit

if TYPE_CHECKING:
    from fedpara_plugins.models.spec import ModelSpec

__all__ = [
    "Payload",
    "PayloadHeader",
    "decode_payload",
    "encode_payload",
    "peek_header",
    "write_payload",
]


@dataclass(frozen=True)
class Payload:
    """Decoded tensors in the sender's order, each of its own memory, and the header."""

    tensors: Tensors
    header: PayloadHeader


def encode_payload(
    tensors: Mapping[str, torch.Tensor],
    *,
    codec: Codec,
    reference: Mapping[str, torch.Tensor] | None = None,
    digest: str | None = None,
    model: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """Code named tensors into bytes.

    Args:
        tensors: dense, of a dtype in `stage.DTYPES`; neither modified nor kept.
        codec: without a reference at hand, ``codec.first_contact()`` is used where it needs one;
            the word ``entropy`` means zlib here, unless ``codec.resolved`` chose better before.
        reference: what the receiver holds too; its hash covers every tensor in it.
        digest: `reference_hash` of ``reference``, where the caller keeps states under it: hashing
            takes a fifth of the time. It is believed; with a wrong one the receiver refuses the
            payload, or takes the delta against another state.
        model: JSON for the receiver to compare with its own model.
        extra: any other JSON of the caller.

    Raises:
        PayloadError: a tensor or ``model`` or ``extra`` cannot travel, or the digest is none.
        MismatchError: the reference does not fit the tensors.
    """
    codec = codec.resolved(None)
    if codec.needs_reference and reference is None:
        codec = codec.first_contact()
    against = plain(reference) if codec.needs_reference and reference is not None else None
    named = None if against is None else digest_of(against, digest)
    coded, notes = codec.encode(plain(tensors), reference=against)
    return write_payload(coded, notes, codec=codec, reference=named, model=model, extra=extra)


def write_payload(
    coded: Tensors,
    notes: Sequence[Notes],
    *,
    codec: Codec,
    reference: str | None,
    model: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None,
) -> bytes:
    """The payload of what ``codec.encode`` returned.

    Args:
        coded: the tensors that it returned.
        notes: and the notes.
        codec: the chain in use.
        reference: hash of what it coded against.
        model: as for `encode_payload`.
        extra: as for `encode_payload`.

    Raises:
        PayloadError: a tensor or ``model`` or ``extra`` cannot travel.
    """
    header = {
        "crc32": CHECKSUM_BLANK,  # first, so that its place is known before any parsing
        "version": FORMAT_VERSION,
        "plugin": __version__,
        "codec": codec.stage_names,
        "reference": reference,
        "model": model,
        "extra": extra,
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
) -> Payload:
    """Decode bytes that anyone may have sent.

    Args:
        data: what `encode_payload` returned.
        reference: the tensors this side holds; their hash is computed where it is needed.
        references: tensors by their hash, where this side holds several.
        limit: bytes that the tensors may have, in the container and after each stage: what this
            side's own model takes. Memory in use at a time stays below five times this (several
            forms of a tensor exist while it is decoded), plus what parsing the header takes.
        stages: known stages by name; all that are registered if None.
        expect: this side's model. The payload must describe the very same (before any tensor is
            decoded), and hold its shared tensors and no others.
        like: this side's tensors; those decoded must have the same names, order, shapes and dtypes.

    Raises:
        MismatchError: the payload is sound, but of another format version, another model, a stage
            that is not installed here, or a reference that this side does not hold.
        PayloadError: anything else; no other error passes.
    """
    text, raw = open_container(data, limit)
    header = parse_header(text)
    if expect is not None:
        check_model(header, expect)
    codec = codec_of(header, stages)
    against = held_reference(header, codec, reference, references)
    coded = load_tensors(raw, header.order)
    try:
        decoded = codec.decode(coded, header.notes, reference=against, limit=limit)
    except PayloadError as error:
        added = other_version(header.plugin_version)
        if type(error) is not PayloadError or not added:
            raise
        raise PayloadError(f"{error}{added}") from error
    size = sum(byte_size(tensor.dtype, tensor.shape) for tensor in decoded.values())
    check_limit(size, limit, "the tensors")
    check_tensors(decoded, expect, like)
    return Payload(decoded, header)


def peek_header(data: bytes) -> PayloadHeader:
    """Read the header, checksum verified, without decoding a tensor.

    Raises:
        MismatchError: another format version.
        PayloadError: not a payload, or a damaged one.
    """
    return parse_header(open_container(data, None)[0])


def _order(tensors: Tensors) -> list[int] | None:
    places = {name: place for place, name in enumerate(sorted(tensors))}
    order = [places[name] for name in tensors]
    return None if order == sorted(order) else order
