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

__all__ = ["FORMAT_VERSION", "PayloadHeader", "header_text", "parse_header", "version_hint"]

FORMAT_VERSION = 1


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
    """

    version: int
    plugin_version: str
    codec: str
    reference: str | None
    model: Mapping[str, Any] | None
    extra: Mapping[str, Any] | None
    order: Sequence[int] | None
    notes: Sequence[Notes]


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
    types = {key: type(value) for key, value in header.items()}
    if types.keys() != _FIELDS.keys() or any(types[key] not in _FIELDS[key] for key in types):
        raise PayloadError(
            f"header fields: expected {', '.join(_FIELDS)}, got "
            f"{ {key: kind.__name__ for key, kind in list(types.items())[:12]} }"
            f"{version_hint(header.get('plugin'))}"
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
