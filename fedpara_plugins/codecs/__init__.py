"""Codecs: chains of small reversible stages between named tensors and bytes.

    codec = parse_codec("int8")                                    # or "delta+int8+zlib"
    data = encode_payload(update, codec=codec, reference=received)
    back = decode_payload(data, reference=received, limit=10**7).tensors

``docs/payload.md`` specifies the bytes. May import ``models``, ``plugins``, ``stages`` and the
rooms below them, and no framework. Offers the functions above, the hash of a reference, error
feedback, and what a third party needs to write a stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpara_plugins._moved import serve_old_names
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.codecs.description import Description, HeaderForm, LostDescriptionError
from fedpara_plugins.codecs.feedback import encode_with_feedback
from fedpara_plugins.codecs.joint import (
    JOINT,
    can_join,
    join_payloads,
    roll_of,
    separate_payloads,
)
from fedpara_plugins.codecs.json_reader import strict_json
from fedpara_plugins.codecs.payload import (
    COMPACT,
    DecodedPayload,
    PayloadHeader,
    decode_payload,
    encode_payload,
    peek_header,
    readable,
)
from fedpara_plugins.codecs.reference import reference_hash
from fedpara_plugins.codecs.roll import Roll, RollRow
from fedpara_plugins.codecs.text import PRESETS, parse_codec
from fedpara_plugins.stages import BUILTIN_STAGES, Notes, Stage, Tensors
from fedpara_plugins.stages.dtypes import byte_size, pack_dtypes, unpack_dtypes
from fedpara_plugins.stages.entropy_decoders import decoders
from fedpara_plugins.stages.stage import check_limit, check_notes

__all__ = [
    "BUILTIN_STAGES",
    "COMPACT",
    "JOINT",
    "PRESETS",
    "Codec",
    "DecodedPayload",
    "Description",
    "HeaderForm",
    "LostDescriptionError",
    "Notes",
    "PayloadHeader",
    "Roll",
    "RollRow",
    "Stage",
    "Tensors",
    "byte_size",
    "can_join",
    "check_limit",
    "check_notes",
    "decode_payload",
    "decoders",
    "encode_payload",
    "encode_with_feedback",
    "join_payloads",
    "pack_dtypes",
    "parse_codec",
    "peek_header",
    "readable",
    "reference_hash",
    "roll_of",
    "separate_payloads",
    "strict_json",
    "unpack_dtypes",
]

if not TYPE_CHECKING:
    __getattr__ = serve_old_names(__name__, {"Payload": "DecodedPayload"})
