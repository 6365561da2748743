"""The payload: a safetensors file whose metadata holds one versioned header.

The format is specified in ``docs/payload.md``. Nothing is ever unpickled, and every size is checked
before anything of that size is allocated.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from fedpara_plugins._version import __version__
from fedpara_plugins.codecs.chain import NONE, Codec, chain_of
from fedpara_plugins.codecs.reference import reference_hash
from fedpara_plugins.codecs.stage import (
    Notes,
    Stage,
    Tensors,
    byte_size,
    check_booleans,
    check_limit,
    dtype_name,
)
from fedpara_plugins.errors import ConfigError, MismatchError, PayloadError

__all__ = ["Payload", "PayloadHeader", "decode_payload", "encode_payload", "peek_header"]

FORMAT_VERSION = 1
MAX_HEADER = 4 * 2**20
"""Bytes of safetensors' header, names of all tensors included: some 20,000 tensors."""
MAX_DEPTH = 32
"""Nesting of JSON, in our header and in safetensors'."""
MAX_DIGITS = 100
"""Digits of an integer in JSON; converting a huge one takes quadratic time."""

_KEY = "fedpara"
# How the header begins inside the file, where it is a JSON string inside JSON.
_CHECKSUM_MARK = rb"{\"crc32\":\""
_CHECKSUM_BLANK = b"00000000"


@dataclass(frozen=True, kw_only=True)
class PayloadHeader:
    """What a payload says of itself.

    Attributes:
        version: of the format.
        plugin_version: of fedpara-plugins on the sender's side, for messages only.
        codec: the chain that was really used, such as ``delta+int8+zlib`` or ``none``.
        reference: `reference_hash` of what was coded against, or None.
        model: the sender's description of its model, opaque here, or None.
        extra: the caller's own data, opaque here, or None.
        order: for each tensor in its order, its place among the container's sorted names; None
            where the sorted order is the right one.
        notes: each stage's notes, in the order of encoding.
    """

    version: int
    plugin_version: str
    codec: str
    reference: str | None
    model: Mapping[str, Any] | None
    extra: Mapping[str, Any] | None
    order: Sequence[int] | None
    notes: Sequence[Notes]


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
    model: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """Code named tensors into bytes.

    Args:
        tensors: dense, of a dtype in `stage.DTYPES`; neither modified nor kept.
        codec: without a reference at hand, ``codec.first_contact()`` is used where it needs one.
        reference: what the receiver holds too; its hash covers every tensor in it.
        model: JSON for the receiver to compare with its own model.
        extra: any other JSON of the caller.

    Raises:
        PayloadError: a tensor or ``model`` or ``extra`` cannot travel.
        MismatchError: the reference does not fit the tensors.
    """
    if codec.needs_reference and reference is None:
        codec = codec.first_contact()
    against = _plain(reference) if codec.needs_reference and reference is not None else None
    coded, notes = codec.encode(_plain(tensors), reference=against)
    header = {
        "crc32": _CHECKSUM_BLANK.decode(),  # first, so that its place is known before any parsing
        "version": FORMAT_VERSION,
        "plugin": __version__,
        "codec": codec.name,
        "reference": None if against is None else reference_hash(against),
        "model": model,
        "extra": extra,
        "order": _order(coded),
        "notes": notes,
    }
    return _write(_unshared(coded), _header_text(header))


def decode_payload(
    data: bytes,
    *,
    reference: Mapping[str, torch.Tensor] | None = None,
    references: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    limit: int,
    stages: Mapping[str, Stage] | None = None,
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

    Raises:
        MismatchError: the payload is sound, but of another format version, a stage that is not
            installed here, or a reference that this side does not hold.
        PayloadError: anything else; no other error passes.
    """
    header, raw = _open(data, limit)
    codec = _codec_of(header, stages)
    against = _reference_of(header, codec, reference, references)
    coded = _load(raw, header.order)
    decoded = codec.decode(coded, header.notes, reference=against, limit=limit)
    size = sum(byte_size(tensor.dtype, tensor.shape) for tensor in decoded.values())
    check_limit(size, limit, "the tensors")
    return Payload(decoded, header)


def peek_header(data: bytes) -> PayloadHeader:
    """Read the header, checksum verified, without decoding a tensor.

    Raises:
        MismatchError: another format version.
        PayloadError: not a payload, or a damaged one.
    """
    return _open(data, None)[0]


# --- tensors ------------------------------------------------------------------------------------


def _plain(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Detached, dense, contiguous, on the CPU; the same memory where that holds already."""
    plain: Tensors = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise PayloadError(f"expected names and tensors, got {name!r}: {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise PayloadError(
                f"tensor {name!r}: expected a dense tensor with values, got layout {tensor.layout} "
                f"on {tensor.device}; call to_dense(), or load its values first"
            )
        dtype_name(tensor.dtype)
        tensor = tensor.detach().cpu()
        plain[name] = tensor.resolve_conj().resolve_neg().contiguous()
    return plain


def _unshared(tensors: Tensors) -> Tensors:
    """Copies of those that share memory with an earlier one, which safetensors does not write."""
    seen: set[int] = set()
    apart: Tensors = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _order(tensors: Tensors) -> list[int] | None:
    places = {name: place for place, name in enumerate(sorted(tensors))}
    order = [places[name] for name in tensors]
    return None if order == sorted(order) else order


# --- container ----------------------------------------------------------------------------------


def _write(tensors: Tensors, header: str) -> bytes:
    if "__metadata__" in tensors:
        raise PayloadError("a tensor cannot be called '__metadata__': safetensors reserves it")
    try:
        data = memoryview(safetensors.torch.save(tensors, metadata={_KEY: header}))
    except Exception as error:
        raise PayloadError(f"safetensors cannot write these tensors: {error!r}") from error
    size = _header_size(data)
    place = _checksum_place(data, size)
    digits = b"%08x" % _checksum(data, place)
    return b"".join((data[:place], digits, data[place + len(digits) :]))


def _open(data: bytes, limit: int | None) -> tuple[PayloadHeader, bytes]:
    """Check the container as a whole; returns the header and the file's bytes."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise PayloadError(f"expected bytes, got {type(data).__name__}")
    view = memoryview(data).cast("B")
    size = _header_size(view)
    if limit is not None:
        check_limit(len(view) - 8 - size, _container_limit(limit), "the container's body")
    place = _checksum_place(view, size)
    found, expected = bytes(view[place : place + 8]), b"%08x" % _checksum(view, place)
    if found != expected:
        raise PayloadError(
            f"damaged payload: checksum {expected.decode()}, header says {found!r}; send it again"
        )
    try:
        outer = _strict_json(bytes(view[8 : 8 + size]).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PayloadError(f"the container's header is not UTF-8: {error}") from error
    metadata = outer.get("__metadata__") if isinstance(outer, dict) else None
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise PayloadError(f"the container has no metadata {_KEY!r}: not a payload")
    return _parse_header(_strict_json(text)), data if isinstance(data, bytes) else bytes(view)


def _header_size(data: memoryview) -> int:
    size = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else -1
    if not 0 < size <= min(len(data) - 8, MAX_HEADER):
        raise PayloadError(
            f"not a payload: {len(data)} bytes whose header would have {size}; expected a "
            f"safetensors file with a header of at most {MAX_HEADER} bytes"
        )
    return int(size)


def _checksum_place(data: memoryview, header_size: int) -> int:
    start = bytes(data[8 : 8 + header_size]).find(_CHECKSUM_MARK)
    place = 8 + start + len(_CHECKSUM_MARK)
    if start < 0 or place + len(_CHECKSUM_BLANK) > 8 + header_size:
        raise PayloadError("not a payload: no header of fedpara-plugins in the file's metadata")
    return place


def _checksum(data: memoryview, place: int) -> int:
    """CRC-32 of the whole file, the digits of the checksum itself taken as zeros."""
    before = zlib.crc32(data[:place])
    return zlib.crc32(data[place + 8 :], zlib.crc32(_CHECKSUM_BLANK, before))


def _container_limit(limit: int) -> int:
    """What cannot be compressed grows a little: zlib's 5 bytes in 16 kB, and its frame."""
    return limit + limit // 64 + 1024


def _load(data: bytes, order: Sequence[int] | None) -> Tensors:
    try:
        # The library checks offsets, overlaps, gaps and sizes, and copies each tensor once.
        loaded = safetensors.torch.load(data)
    except Exception as error:
        raise PayloadError(f"damaged container: {error!r}") from error
    for name, tensor in loaded.items():
        check_booleans(name, tensor)
    names = sorted(loaded)
    if order is None:
        order = range(len(names))
    if sorted(order) != list(range(len(names))):
        raise PayloadError(f"the header's order is not one of {len(names)} tensors")
    return {names[place]: loaded[names[place]] for place in order}


# --- header -------------------------------------------------------------------------------------

_FIELDS: Mapping[str, tuple[type, ...]] = {
    "crc32": (str,),
    "version": (int,),
    "plugin": (str,),
    "codec": (str,),
    "reference": (str, type(None)),
    "model": (dict, type(None)),
    "extra": (dict, type(None)),
    "order": (list, type(None)),
    "notes": (list,),
}


def _header_text(header: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(header, separators=(",", ":"))
        _parse_header(_strict_json(text))  # what a receiver would refuse is refused here
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(f"model and extra must be plain JSON objects: {error}") from error
    return text


def _parse_header(header: Any) -> PayloadHeader:
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is not int:
        raise PayloadError("the header is not a JSON object with a version")
    if version != FORMAT_VERSION:
        raise MismatchError(
            f"payload of format version {version} (sender: fedpara-plugins "
            f"{str(header.get('plugin'))[:40]}), this side reads version {FORMAT_VERSION} "
            f"(fedpara-plugins {__version__}); install the same version on both sides"
        )
    types = {key: type(value) for key, value in header.items()}
    if types.keys() != _FIELDS.keys() or any(types[key] not in _FIELDS[key] for key in types):
        raise PayloadError(
            f"header fields: expected {', '.join(_FIELDS)}, got "
            f"{ {key: kind.__name__ for key, kind in list(types.items())[:12]} }"
        )
    order, notes = header["order"], header["notes"]
    if order is not None and not all(type(place) is int for place in order):
        raise PayloadError("the header's order is not a list of integers")
    if not all(isinstance(note, dict) for note in notes):
        raise PayloadError("the header's notes are not a list of objects")
    return PayloadHeader(
        version=version,
        plugin_version=header["plugin"],
        codec=header["codec"],
        reference=header["reference"],
        model=header["model"],
        extra=header["extra"],
        order=order,
        notes=notes,
    )


def _codec_of(header: PayloadHeader, stages: Mapping[str, Stage] | None) -> Codec:
    if stages is None:
        from fedpara_plugins.plugins import stages as registered  # it imports this package

        stages = registered()
    try:
        return chain_of([] if header.codec == NONE else header.codec.split("+"), stages)
    except ConfigError as error:
        raise MismatchError(
            f"payload of codec {header.codec[:80]!r} (sender: fedpara-plugins "
            f"{header.plugin_version[:40]}), this side has the stages {', '.join(stages)} "
            f"(fedpara-plugins {__version__}); install the stage's plugin on both sides"
        ) from error


def _reference_of(
    header: PayloadHeader,
    codec: Codec,
    reference: Mapping[str, torch.Tensor] | None,
    references: Mapping[str, Mapping[str, torch.Tensor]] | None,
) -> Tensors | None:
    if not codec.needs_reference:
        return None
    if header.reference is None:
        raise PayloadError(f"codec {codec.name!r} needs a reference and the header names none")
    if references is not None and header.reference in references:
        return _plain(references[header.reference])
    held = list(references or ())
    if reference is not None:
        held.append(reference_hash(_plain(reference)))
        if held[-1] == header.reference:
            return _plain(reference)
    raise MismatchError(
        f"payload coded against reference {header.reference[:64]}, this side holds "
        f"{', '.join(held[-3:]) or 'none'}; code without a reference (first contact) instead"
    )


# --- JSON from strangers ------------------------------------------------------------------------

# Whole strings, so that brackets inside them do not count. Escapes are taken out before: with them
# in the pattern, the engine would keep some 100 bytes for each character of a long string.
_TOKENS = re.compile(r'"[^"]*"?|[\[\]{}]')
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


def _strict_json(text: str) -> Any:
    """Parse JSON of bounded nesting, without repeated keys, NaN, infinity or giant numbers."""
    unescaped = text.replace("\\\\", "").replace('\\"', "")
    depth = 0
    for token in _TOKENS.finditer(unescaped):
        depth += _STEPS.get(unescaped[token.start()], 0)
        if depth > MAX_DEPTH:
            raise PayloadError(f"JSON nested deeper than {MAX_DEPTH} levels")
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_bounded_int,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except PayloadError:
        raise
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"malformed JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise PayloadError("a JSON object has the same key twice")
    return found


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise PayloadError(f"JSON integer of {len(digits)} digits, at most {MAX_DIGITS} are read")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise PayloadError(f"JSON number {number[:20]} is not finite")
    return value
