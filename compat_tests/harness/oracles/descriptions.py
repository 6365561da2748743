"""Payloads that tests look at from outside: descriptions and rolls that this process has formed.

A payload of version 2 refers to a description that both sides hold, and a joint payload to a roll.
Whoever watches the messages of a run in one process finds them here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedpara_plugins import codecs
from fedpara_plugins.codecs import (
    DecodedPayload,
    Description,
    PayloadHeader,
    Roll,
    RollRow,
    separate_payloads,
)
from fedpara_plugins.exchange import JOINT_RECORD

__all__ = ["ROLLS", "SEEN", "decode_payload", "peek_header", "separated"]

SEEN: dict[str, Description] = {}
"""By hash, every description that was formed since this module was imported."""

_of = Description.of


def _watched(model: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Description:
    description = _of(model, tensors)
    SEEN[description.digest] = description
    return description


Description.of = _watched  # type: ignore[method-assign]

ROLLS: dict[str, Roll] = {}
"""By hash, every roll that was formed since this module was imported."""

_init = Roll.__init__


def _noted(self: Roll, rows: tuple[RollRow, ...]) -> None:
    _init(self, rows)
    ROLLS[self.digest] = self


Roll.__init__ = _noted  # type: ignore[method-assign]


def separated(payloads: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the records of a message, where one payload may hold them all."""
    found = dict(payloads)
    if JOINT_RECORD in found:
        found |= separate_payloads(found.pop(JOINT_RECORD), rolls=ROLLS)
    return found


def decode_payload(data: bytes, **options: Any) -> DecodedPayload:
    """Do what `codecs.decode_payload` does, with all descriptions of this process."""
    return codecs.decode_payload(data, descriptions=SEEN, **options)


def peek_header(data: bytes) -> PayloadHeader:
    """Do what `codecs.peek_header` does, with all descriptions of this process."""
    return codecs.peek_header(data, descriptions=SEEN)
