"""The invariant that holds for arbitrary bytes, and the bytes to start from.

Everything that reads what others wrote is tried: the payload's decoder, the receiving end with its
references, the description of a model, ledgers with the report drawn from them, ``inspect``, and
the messages of the FedML adapter.
Each either raises an error of this project whose text fits a line of a log, or gives something
sound. Anything else is a finding.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from envelopes import EnvelopeChecker, is_envelope
from ledgers import LedgerChecker, is_ledger
from torch import nn

from fedpara_plugins import FedParaError, MismatchError, ModelSpec, PayloadError, convert
from fedpara_plugins.cli.inspect_file import inspect_file
from fedpara_plugins.codecs import (
    PRESETS,
    Codec,
    Description,
    HeaderForm,
    PayloadHeader,
    Stage,
    Tensors,
    decode_payload,
    encode_payload,
    parse_codec,
    peek_header,
    reference_hash,
)
from fedpara_plugins.codecs.chain import NONE, codec_from_names
from fedpara_plugins.plugins import stages
from fedpara_plugins.references import ClientReferences, GridDownlink, PerClientDownlink
from fedpara_plugins.testing import hostile
from fedpara_plugins.testing.hostile import check_refusal, every_codec, pack
from fedpara_plugins.testing.samples import SAMPLE_NAMES, finite_sample, nearby, same_bits
from fedpara_plugins_fedml.messages import hostile as messages

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "codecs" / "golden"
LIMIT = 1 << 14
"""Bytes that decoded tensors may have; every sample takes less."""
RECORD = "model"
MARK = b'{\\"base\\":'
"""Stands in a message whose reference the receiver derives."""


class InvariantError(AssertionError):
    """The library did something that it must never do."""


class Checker:
    """Checks inputs against a reference and the stages that are installed, and counts them.

    Args:
        folder: for the files that `inspect_file` and the readers of ledgers are given.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages: dict[str, Stage] = dict(stages())
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
        options = {"method": "pfedpara", "min_size": 1, "private": ["1.bias"]}
        self.model = convert(layers, **options)
        self.spec = ModelSpec.of(self.model)
        self.described = self.spec.to_json()
        self.reference: Tensors = {}
        for name in SAMPLE_NAMES:
            self.reference.update(nearby(finite_sample(name)))
        self.references = {reference_hash(self.reference): self.reference}
        golden = (GOLDEN / "v1_reference.safetensors").read_bytes()
        old = decode_payload(golden, limit=LIMIT).tensors
        self.references[reference_hash(old)] = old
        held = dict(list(self.reference.items())[:3])
        known = Description.of(self.described, self.reference)
        self.descriptions = {known.digest: known}
        self.forms = (None, HeaderForm(), HeaderForm(known))
        self.held = {
            f"{RECORD}/last": encode_payload(held, codec=parse_codec(NONE)),
            f"{RECORD}/description": known.to_bytes(),
        }
        self.ledgers = LedgerChecker(folder)
        self.envelopes = EnvelopeChecker(self._payload)
        self.decoded = self.refused = 0

    def check(self, data: bytes) -> bool:
        """Try one input; whether it was taken for sound.

        Raises:
            InvariantError: the invariant is broken.
            Exception: whatever else the library let pass, which is a finding too.
        """
        if is_envelope(data):
            sound = self.envelopes.check(data)
        else:
            sound = self.ledgers.check(data) if is_ledger(data) else self._payload(data)
        if sound:
            self.decoded += 1
        else:
            self.refused += 1
        return sound

    def _payload(self, data: bytes) -> bool:
        chance = zlib.crc32(data)  # what costs time is done to some inputs, the same in every run
        if MARK in data or chance % 8 == 0:
            with suppress(PayloadError):
                self._receive(data, peek_header(data))
                peek_header(data, descriptions=self.descriptions)
        if chance % 32 == 1:
            self._inspect(data)
        try:
            payload = decode_payload(
                data,
                references=self.references,
                limit=LIMIT,
                stages=self.stages,
                descriptions=self.descriptions,
            )
        except PayloadError as error:
            check_refusal(error)
            return False
        tensors = payload.tensors
        if sum(tensor.nbytes for tensor in tensors.values()) > LIMIT:
            raise InvariantError("decoded tensors exceed the limit")
        if peek_header(data, descriptions=self.descriptions) != payload.header:
            raise InvariantError("peek_header and decode_payload read different headers")
        names = payload.header.codec
        if chance % 4:
            return True
        # An entropy coder's stream can hold complex128; a safetensors file cannot.
        if not any(tensor.dtype == torch.complex128 for tensor in tensors.values()):
            self._again(tensors, codec_from_names([], self.stages))
        self._again(
            tensors, codec_from_names([] if names == NONE else names.split("+"), self.stages)
        )
        return True

    def _describe(self, model: Mapping[str, Any]) -> None:
        """Read the description of a model, and make the private tensors that it asks for."""
        try:
            spec = ModelSpec.from_json(model, self.spec.shared_keys, limit=LIMIT)
            first = spec.initial_private()
            if sum(value.nbytes for value in first.values()) > 2 * LIMIT:  # float64 own tensors
                raise InvariantError("the private tensors exceed the limit")
            if ModelSpec.from_json(spec.to_json(), spec.shared_keys) != spec:
                raise InvariantError("a description changes when it is sent on")
        except PayloadError as error:
            check_refusal(error)
        try:
            self.spec.check_described(model, here="here", there="there")
        except PayloadError as error:
            check_refusal(error)

    def _receive(self, data: bytes, header: PayloadHeader) -> None:
        """Receive as a client does, with what it holds and with states that it derives."""
        if header.model is not None and header.model != self.described:
            self._describe(header.model)
        storage = dict(self.held)
        client = ClientReferences(storage)
        expect = self.spec if zlib.crc32(data) & 16 else None
        try:
            received = client.receive(RECORD, data, limit=LIMIT, expect=expect)
        except PayloadError as error:
            check_refusal(error)
            if storage != self.held:
                raise InvariantError("a message that was refused changed what is held") from None
            return
        if sum(tensor.nbytes for tensor in received.tensors.values()) > LIMIT:
            raise InvariantError("received tensors exceed the limit")
        if any(tensor.dtype == torch.complex128 for tensor in received.tensors.values()):
            return  # cannot be kept, and no model has such a state
        client.keep(RECORD, received)
        if client.holds(RECORD)[0] != received.reference:
            raise InvariantError("what is held is not what was received")

    def _inspect(self, data: bytes) -> None:
        path = self.folder / "inspected"
        path.write_bytes(data)
        try:
            text = inspect_file(path)
        except FedParaError as error:  # of a ledger, where the first byte is one's
            check_refusal(error)
        else:
            if not text.replace("\n", "").isprintable():
                raise InvariantError(f"inspect would print control characters: {text[:200]!r}")

    def _again(self, tensors: Tensors, codec: Codec) -> None:
        text = codec.name
        reference = self.reference if codec.needs_reference else None
        try:
            form = self.forms[len(tensors) % len(self.forms)]
            data = encode_payload(
                tensors, codec=codec, reference=reference, model=self.described, form=form
            )
        except PayloadError as error:
            # A name that the damage changed is in no reference.
            strange = isinstance(error, MismatchError) and codec.needs_reference
            if codec.lossless and not strange:
                raise InvariantError(
                    f"decoded tensors cannot be sent by {text!r}: {error}"
                ) from error
            return  # NaN before a quantiser, or an overflowing difference
        back = decode_payload(
            data,
            reference=reference,
            limit=2 * LIMIT,
            stages=self.stages,
            descriptions=self.descriptions,
        ).tensors
        if codec.lossless and not same_bits(back, tensors):
            raise InvariantError(f"decoded tensors change when sent again by {text!r}")
        if _layout(back) != _layout(tensors):
            raise InvariantError(f"names, dtypes or shapes change when sent again by {text!r}")

    def seeds(self) -> Iterator[bytes]:
        """Yield golden files, coded samples, downlinks, ledgers and messages, and damaged ones."""
        yield from (path.read_bytes() for path in sorted(GOLDEN.iterdir()))
        yield from (b"", b"\x00" * 8, b"{}", pack({}), pack({"__metadata__": {}}))
        downlinks = list(self._downlinks())
        few = [*downlinks, *self.ledgers.seeds(), *self.envelopes.seeds(downlinks[:2])]
        sound = [*few]
        for codec in every_codec(self.stages).values():
            for name in SAMPLE_NAMES:
                try:
                    data = encode_payload(
                        finite_sample(name),
                        codec=codec,
                        reference=self.reference,
                        model=None if len(sound) % 8 else self.described,
                        extra={"round": 3},
                        form=self.forms[len(sound) % len(self.forms)],
                    )
                except PayloadError:  # some stages refuse the samples' extreme values
                    continue
                sound.append(data)
        yield from dict.fromkeys(sound)
        draw = random.Random(0)
        yield from (damaged(data, draw) for data in [*sound, *few * 8])

    def _downlinks(self) -> Iterator[bytes]:
        """Yield messages against states that the receiver derives: seeded, and all zeros."""
        state = {n: x for n, x in self.model.state_dict().items() if n in self.spec.shared_keys}
        for scheme in (PerClientDownlink(), GridDownlink()):
            for codec in ("small", "delta+zlib"):
                given = {"spec": self.spec, "codec": parse_codec(codec), "form": HeaderForm()}
                yield scheme.encode("a", RECORD, state, **given).payload
                scheme.refused("a", RECORD)
                yield scheme.encode("a", RECORD, state, **given).payload

    def known_texts(self) -> list[str]:
        """Return the presets and stages that this run covers, for its report."""
        return [*PRESETS, *self.stages]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return bytes near ``data`` in its own format."""
    return (messages if is_envelope(data) else hostile).damaged(data, draw)


def _layout(tensors: Tensors) -> list[tuple[str, torch.dtype, torch.Size]]:
    return [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
