"""Codecs: chains of small reversible stages between named tensors and bytes.

    codec = parse_codec("int8")                                    # or "delta+int8+zlib"
    data = encode_payload(update, codec=codec, reference=received)
    back = decode_payload(data, reference=received, limit=10**7).tensors

The bytes are specified in ``docs/payload.md``. Nothing here knows a framework.
"""

from __future__ import annotations

from fedpara_plugins.codecs.chain import PRESETS, Codec, parse_codec
from fedpara_plugins.codecs.delta import DeltaStage
from fedpara_plugins.codecs.entropy_zlib import ZlibStage
from fedpara_plugins.codecs.int8 import Int8Stage
from fedpara_plugins.codecs.payload import (
    Payload,
    PayloadHeader,
    decode_payload,
    encode_payload,
    peek_header,
)
from fedpara_plugins.codecs.reference import reference_hash
from fedpara_plugins.codecs.stage import Notes, Stage, Tensors

__all__ = [
    "BUILTIN_STAGES",
    "PRESETS",
    "Codec",
    "Notes",
    "Payload",
    "PayloadHeader",
    "Stage",
    "Tensors",
    "decode_payload",
    "encode_payload",
    "parse_codec",
    "peek_header",
    "reference_hash",
]

BUILTIN_STAGES: tuple[Stage, ...] = (DeltaStage(), Int8Stage(), ZlibStage())
"""What this distribution registers through ``fedpara_register_stages``."""
