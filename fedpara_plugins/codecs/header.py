"""The header of a payload: written as JSON text, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpara_plugins._version import __version__
from fedpara_plugins.codecs.json_reader import strict_json
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.stages.stage import Notes

__all__ = [
    "COMPACT_VERSION",
    "FORMAT_VERSION",
    "PayloadHeader",
    "compact_header",
    "header_text",
    "parse_header",
    "version_hint",
]

FORMAT_VERSION = 1
"""Of a header that stands in safetensors' metadata; every release reads it."""
COMPACT_VERSION = 2
"""Of a header that is compressed, for a receiver that says that it reads it."""


@dataclass(frozen=True, kw_only=True)
class PayloadHeader:
    """The description that a payload carries of itself.

    Attributes:
        version: of the format.
        plugin_version: version of fedpara-plugins at the sender, for messages only.
        codec: the stages in use, such as ``delta+int8+zlib``, or ``none``.
        reference: `reference_hash` of the reference in use, or None.
        model: the sender's description of its model, or None; not interpreted here.
        extra: the caller's own data, or None; not interpreted here.
        order: for each tensor in the sender's order, its place among the container's sorted names;
            None if the sorted order is the sender's.
        notes: notes of each stage, in the order of encoding.
        description: hash of the description that the header refers to, all zeros if it is written
            whole; None in version 1.
    """

    version: int
    plugin_version: str
    codec: str
    reference: str | None
    model: Mapping[str, Any] | None
    extra: Mapping[str, Any] | None
    order: Sequence[int] | None
    notes: Sequence[Notes]
    description: str | None = None


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
_COMPACT_FIELDS = {
    name: kinds for name, kinds in _FIELDS.items() if name not in ("crc32", "version", "order")
}


def version_hint(plugin: object) -> str:
    """Return what to add to a refusal if the sender has another version; else an empty text."""
    if plugin == __version__:
        return ""
    return (
        f"; the sender has fedpara-plugins {str(plugin)[:40]}, this side {__version__}: if it is "
        "sound, the same version on both sides will read it"
    )


def header_text(header: Mapping[str, Any]) -> str:
    """Return the header as JSON text, with its fields in the given order.

    Raises:
        PayloadError: the caller's parts are not plain JSON, or nested too deep to be read.
    """
    try:
        text = json.dumps(header, separators=(",", ":"))
        parse_header(text)  # refuse what a receiver would refuse
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(f"model and extra must be plain JSON objects: {error}") from error
    return text


def parse_header(text: str) -> PayloadHeader:
    """Return the header that a JSON text describes.

    Raises:
        MismatchError: another format version.
        PayloadError: a field is missing, unknown or of another type.
    """
    header = strict_json(text)
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is not int:
        raise PayloadError("the header is not a JSON object with a version")
    if version != FORMAT_VERSION:
        raise MismatchError(
            f"payload of format version {version} (sender: fedpara-plugins "
            f"{str(header.get('plugin'))[:40]}), this side reads version {FORMAT_VERSION} "
            f"(fedpara-plugins {__version__}); install the same version on both sides"
        )
    _check_fields(header, _FIELDS)
    order = header["order"]
    if order is not None and not all(type(place) is int for place in order):
        raise PayloadError("the header's order is not a list of integers")
    return _header(header, version=version, order=order)


def compact_header(
    fields: Mapping[str, Any], order: Sequence[int] | None, description: str
) -> PayloadHeader:
    """Return the header of version 2 that these fields describe.

    Args:
        fields: parsed, without those of the tensors.
        order: as in `PayloadHeader`.
        description: hash of the description that it refers to.

    Raises:
        PayloadError: a field is missing, unknown or of another type.
    """
    _check_fields(fields, _COMPACT_FIELDS)
    return _header(fields, version=COMPACT_VERSION, order=order, description=description)


def _check_fields(fields: Mapping[str, Any], known: Mapping[str, tuple[type, ...]]) -> None:
    types = {key: type(value) for key, value in fields.items()}
    if types.keys() != known.keys() or any(types[key] not in known[key] for key in types):
        raise PayloadError(
            f"header fields: expected {', '.join(known)}, got "
            f"{ {key: kind.__name__ for key, kind in list(types.items())[:12]} }"
            f"{version_hint(fields.get('plugin'))}"
        )
    if not all(isinstance(note, dict) for note in fields["notes"]):
        raise PayloadError("the header's notes are not a list of objects")


def _header(
    fields: Mapping[str, Any],
    *,
    version: int,
    order: Sequence[int] | None,
    description: str | None = None,
) -> PayloadHeader:
    return PayloadHeader(
        version=version,
        plugin_version=fields["plugin"],
        codec=fields["codec"],
        reference=fields["reference"],
        model=fields["model"],
        extra=fields["extra"],
        order=order,
        notes=fields["notes"],
        description=description,
    )
