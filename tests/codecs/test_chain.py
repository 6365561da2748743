"""Chains: their text, their order, and what they guarantee around any stage."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins.codecs import (
    BUILTIN_STAGES,
    PRESETS,
    Codec,
    Stage,
    decode_payload,
    encode_payload,
    parse_codec,
    reference_hash,
)
from fedpara_plugins.errors import ConfigError, PayloadError
from fedpara_plugins.stages.entropy_zlib import ZlibStage
from fedpara_plugins.stages.int8 import Int8Stage
from fedpara_plugins.testing.samples import finite_sample, nearby, same_bits

STAGES = {stage.name: stage for stage in BUILTIN_STAGES}


class Careless(Stage):
    """A third party's stage whose decoder does whatever it is told."""

    name = "careless"
    lossless = True

    def __init__(self, decoder):
        self.decoder = decoder

    def encode(self, tensors, *, reference):
        return tensors, {}

    def decode(self, tensors, notes, *, reference, limit):
        return self.decoder(tensors)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("none", "none"),
        ("int8", "delta+int8+zlib"),
        ("delta+int8+zlib", "delta+int8+zlib"),
        (" delta + int8 ", "delta+int8"),
        ("int8+zlib", "int8+zlib"),
        ("zlib", "zlib"),
    ],
)
def test_text_has_one_canonical_name(text, name):
    codec = parse_codec(text, STAGES)
    assert codec.name == name
    assert [stage.name for stage in codec.stages] == ([] if name == "none" else name.split("+"))


def test_the_canonical_name_of_every_preset_means_the_same():
    for preset in PRESETS:
        codec = parse_codec(preset, STAGES)
        assert parse_codec(codec.name, STAGES) == codec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("brotli", "unknown stage 'brotli'.*none, lossless, int8.*delta, int8, zlib"),
        ("delta+brotli", "unknown stage 'brotli'"),
        ("", "unknown stage ''"),
        ("delta++zlib", "unknown stage ''"),
        ("none+zlib", "unknown stage 'none'"),
        ("delta+delta", "'delta' occurs twice"),
        ("zlib+delta", "'zlib' makes one opaque stream and must be the last"),
        ("delta+zlib+int8", "'int8' follows"),
        ("int8+delta+zlib", "'delta' needs the plain tensors and must come before 'int8'"),
    ],
)
def test_what_cannot_work_is_refused_with_what_is_known(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_codec(text, STAGES)


def test_without_stages_the_registry_is_asked():
    assert parse_codec("int8").name == "delta+int8+zlib"
    with pytest.raises(ConfigError, match="brotli"):
        parse_codec("brotli")


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("none", "none"),
        ("int8", "zlib"),
        ("delta+int8", "none"),
        ("lossless", "planes+entropy:prefer=zstd"),
        ("delta+planes+zlib", "planes+zlib"),
    ],
)
def test_first_contact_keeps_what_is_lossless_and_needs_no_reference(text, first):
    codec = parse_codec(text, STAGES).first_contact()
    assert codec.name == first
    assert codec.lossless
    assert not codec.needs_reference


def test_first_contact_drops_what_needs_a_reference_though_it_is_lossless():
    exact = Careless(lambda tensors: tensors)
    exact.needs_reference = True
    codec = Codec((exact, STAGES["zlib"]))
    assert (codec.lossless, codec.needs_reference) == (True, True)
    assert codec.first_contact().name == "zlib"


@pytest.mark.parametrize("text", ["none", "lossless", "int8", "delta", "delta+zlib", "delta+int8"])
@pytest.mark.parametrize("sample", ["plain", "buffers", "corners", "strided", "nothing"])
def test_every_chain_gives_back_names_order_dtypes_and_shapes(text, sample):
    tensors = finite_sample(sample)
    codec = parse_codec(text, STAGES).resolved(None)
    coded, notes = codec.encode(tensors, reference=nearby(tensors))
    back = codec.decode(coded, notes, reference=nearby(tensors), limit=10**6)
    assert [(n, t.dtype, t.shape) for n, t in back.items()] == [
        (n, t.dtype, t.shape) for n, t in tensors.items()
    ]
    if codec.lossless:
        assert same_bits(back, tensors)


def test_int8_on_the_delta_is_as_exact_as_the_update_is_small():
    reference = {"x": torch.randn(1000, generator=torch.Generator().manual_seed(0))}
    update = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 1e-3
    codec = parse_codec("int8", STAGES)
    coded, notes = codec.encode({"x": reference["x"] + update}, reference=reference)
    back = codec.decode(coded, notes, reference=reference, limit=10**6)["x"]
    error = (back - reference["x"] - update).norm() / update.norm()
    assert error < 0.01


@pytest.mark.parametrize("error", [ValueError, KeyError, RecursionError, MemoryError])
def test_whatever_a_stage_raises_becomes_a_payload_error(error):
    def fail(tensors):
        raise error("oops")

    with pytest.raises(PayloadError, match=r"'careless' failed to decode.*oops"):
        Codec((Careless(fail),)).decode({}, [{}], reference=None, limit=1)


def test_a_stage_that_ignores_the_limit_is_caught():
    codec = Codec((Careless(lambda tensors: {"x": torch.ones(100)}),))
    with pytest.raises(PayloadError, match="'careless' would take 400 bytes"):
        codec.decode({}, [{}], reference=None, limit=399)


def test_notes_of_another_number_of_stages_are_refused():
    with pytest.raises(PayloadError, match="notes of 1 stages, got 2"):
        parse_codec("zlib", STAGES).decode({}, [{}, {}], reference=None, limit=1)


class Watched(dict):
    """States by hash, which note when they are looked up."""

    def __init__(self, states, log):
        super().__init__(states)
        self._log = log

    def get(self, key):
        self._log.append("reference")
        return super().get(key)


def test_a_reference_is_loaded_after_the_stages_that_need_none(monkeypatch):
    state = {"w": torch.ones(4, 4)}
    data = encode_payload(
        {"w": torch.full((4, 4), 2.0)}, codec=parse_codec("delta+int8+zlib"), reference=state
    )
    log = []
    for stage in (Int8Stage, ZlibStage):
        inner = stage.decode

        def decode(self, *args, inner=inner, **kwargs):
            assert kwargs["reference"] is None
            log.append(self.name)
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(stage, "decode", decode)
    held = Watched({reference_hash(state): state}, log)
    found = decode_payload(data, references=held, limit=100).tensors
    assert torch.equal(found["w"], torch.full((4, 4), 2.0))
    assert log == ["zlib", "int8", "reference"]
