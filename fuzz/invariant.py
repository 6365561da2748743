"""What must hold for any bytes whatever, and the bytes to start from.

Decoding either raises `PayloadError`, or gives tensors within the limit that encode and decode
again to the same bits. Anything else is a finding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpara_plugins import ModelSpec, convert
from fedpara_plugins.codecs import (
    PRESETS,
    Codec,
    Stage,
    Tensors,
    decode_payload,
    encode_payload,
    peek_header,
    reference_hash,
)
from fedpara_plugins.codecs.chain import NONE, chain_of
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.plugins import stages
from fedpara_plugins.testing.hostile import damaged, every_codec, pack
from fedpara_plugins.testing.samples import SAMPLE_NAMES, finite_sample, nearby, same_bits

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "codecs" / "golden"
LIMIT = 1 << 14
"""Bytes that decoded tensors may have; every sample takes less."""


class InvariantError(AssertionError):
    """The library did something that it must never do."""


class Checker:
    """Checks inputs against a reference and the stages that are installed, and counts them."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = dict(stages())
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
        options = {"method": "pfedpara", "min_size": 1, "private": ["1.bias"]}
        self.spec = ModelSpec.of(convert(layers, **options))
        self.reference: Tensors = {}
        for name in SAMPLE_NAMES:
            self.reference.update(nearby(finite_sample(name)))
        self.references = {reference_hash(self.reference): self.reference}
        self.decoded = self.refused = 0
        # Refused by the chain, for what a stage let pass: sound, but a message that says little.
        self.late: dict[str, bytes] = {}

    def check(self, data: bytes) -> bool:
        """Try one input; whether it decoded.

        Raises:
            InvariantError: the invariant is broken.
            Exception: whatever else the library let pass, which is a finding too.
        """
        try:
            payload = decode_payload(
                data, references=self.references, limit=LIMIT, stages=self.stages
            )
        except PayloadError as error:
            if "MemoryError" in str(error):
                raise InvariantError(f"refused only for want of memory: {error}") from error
            if "failed to decode" in str(error):
                self.late.setdefault(str(error)[:120], data)
            self.refused += 1
            return False
        self.decoded += 1
        tensors = payload.tensors
        if sum(tensor.nbytes for tensor in tensors.values()) > LIMIT:
            raise InvariantError("decoded tensors exceed the limit")
        if payload.header.model is not None:
            self._describe(payload.header.model, tuple(tensors))
        if peek_header(data) != payload.header:
            raise InvariantError("peek_header and decode_payload read different headers")
        names = payload.header.codec
        # An entropy coder's stream can hold complex128; a safetensors file cannot.
        if not any(tensor.dtype == torch.complex128 for tensor in tensors.values()):
            self._again(tensors, chain_of([], self.stages))
        self._again(tensors, chain_of([] if names == NONE else names.split("+"), self.stages))
        return True

    def _describe(self, model: Mapping[str, Any], names: tuple[str, ...]) -> None:
        """Read the description of a model: anything but `PayloadError` is a finding."""
        with suppress(PayloadError):
            ModelSpec.from_json(model, names)
        with suppress(PayloadError):
            self.spec.check_described(model, here="here", there="there")

    def _again(self, tensors: Tensors, codec: Codec) -> None:
        text = codec.name
        reference = self.reference if codec.needs_reference else None
        try:
            data = encode_payload(tensors, codec=codec, reference=reference)
        except PayloadError as error:
            # A name that the damage changed is in no reference.
            strange = isinstance(error, MismatchError) and codec.needs_reference
            if codec.lossless and not strange:
                raise InvariantError(
                    f"decoded tensors cannot be sent by {text!r}: {error}"
                ) from error
            return  # NaN before a quantiser, or an overflowing difference
        back = decode_payload(
            data, reference=reference, limit=2 * LIMIT, stages=self.stages
        ).tensors
        if codec.lossless and not same_bits(back, tensors):
            raise InvariantError(f"decoded tensors change when sent again by {text!r}")
        if _layout(back) != _layout(tensors):
            raise InvariantError(f"names, dtypes or shapes change when sent again by {text!r}")

    def seeds(self) -> Iterator[bytes]:
        """Golden files, every codec on every sample, and payloads damaged in known ways."""
        yield from (path.read_bytes() for path in sorted(GOLDEN.iterdir()))
        yield from (b"", b"\x00" * 8, b"{}", pack({}), pack({"__metadata__": {}}))
        sound = []
        for codec in every_codec(self.stages).values():
            for name in SAMPLE_NAMES:
                try:
                    data = encode_payload(
                        finite_sample(name),
                        codec=codec,
                        reference=self.reference,
                        model=self.spec.to_json(),
                        extra={"round": 3},
                    )
                except PayloadError:  # some stages refuse the samples' extreme values
                    continue
                sound.append(data)
        yield from dict.fromkeys(sound)
        draw = random.Random(0)
        yield from (damaged(data, draw) for data in sound)

    def known_texts(self) -> list[str]:
        """Presets and stages that this run covers, for its report."""
        return [*PRESETS, *self.stages]


def _layout(tensors: Tensors) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
