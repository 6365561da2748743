"""Codecs: chains of small reversible stages between named tensors and bytes.

    codec = parse_codec("int8")                                    # or "delta+int8+zlib"
    data = encode_payload(update, codec=codec, reference=received)
    back = decode_payload(data, reference=received, limit=10**7).tensors

The bytes are specified in ``docs/payload.md``. Nothing here knows a framework.
"""

from __future__ import annotations

from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.codecs.feedback import encode_with_feedback
from fedpara_plugins.codecs.json_reader import strict_json
from fedpara_plugins.codecs.payload import (
    Payload,
    PayloadHeader,
    decode_payload,
    encode_payload,
    peek_header,
)
from fedpara_plugins.codecs.reference import reference_hash
from fedpara_plugins.codecs.text import PRESETS, parse_codec
from fedpara_plugins.stages import BUILTIN_STAGES
from fedpara_plugins.stages.entropy_decoders import decoders
from fedpara_plugins.stages.stage import (
    Notes,
    Stage,
    Tensors,
    byte_size,
    check_limit,
    check_notes,
    pack_dtypes,
    unpack_dtypes,
)

__all__ = [
    "BUILTIN_STAGES",
    "PRESETS",
    "Codec",
    "Notes",
    "Payload",
    "PayloadHeader",
    "Stage",
    "Tensors",
    "byte_size",
    "check_limit",
    "check_notes",
    "decode_payload",
    "decoders",
    "encode_payload",
    "encode_with_feedback",
    "pack_dtypes",
    "parse_codec",
    "peek_header",
    "reference_hash",
    "strict_json",
    "unpack_dtypes",
]
