"""Payloads: what goes in comes out, what the header says, and bytes that stay readable for ever."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from torch import nn

from fedpara_plugins._version import __version__
from fedpara_plugins.codecs import (
    BUILTIN_STAGES,
    Codec,
    Stage,
    decode_payload,
    encode_payload,
    encode_with_feedback,
    parse_codec,
    peek_header,
    reference_hash,
)
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.stages.stage import DTYPES, STREAM_DTYPES, tensor_bytes
from fedpara_plugins.testing.samples import SAMPLE_NAMES, finite_sample, nearby, same_bits

STAGES = {stage.name: stage for stage in BUILTIN_STAGES}
GOLDEN = Path(__file__).parent / "golden"
NONE, LOSSLESS, INT8 = (parse_codec(name, STAGES) for name in ("none", "lossless", "int8"))


def decode(data, *, limit=10**6, **options):
    return decode_payload(data, limit=limit, stages=STAGES, **options)


def bits_of(dtype, shape):
    """Tensors of any bits whatever, NaN of all kinds included."""
    size = math.prod(shape) * dtype.itemsize
    values = st.integers(0, 1) if dtype == torch.bool else st.integers(0, 255)

    def build(octets):
        return torch.tensor(octets, dtype=torch.uint8).view(dtype).reshape(shape)

    if size == 0:
        return st.just(torch.empty(shape, dtype=dtype))
    return st.lists(values, min_size=size, max_size=size).map(build)


any_tensor = st.tuples(
    st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 3), max_size=3)
).flatmap(lambda kind: bits_of(*kind))
wide_tensor = st.tuples(
    st.sampled_from(list(STREAM_DTYPES.values())), st.lists(st.integers(0, 12), max_size=2)
).flatmap(lambda kind: bits_of(*kind))
any_name = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda n: n != "__metadata__")
any_state = st.dictionaries(any_name, any_tensor, max_size=6)

plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(tensors=any_state, codec=st.sampled_from([NONE, LOSSLESS]))
def test_lossless_codecs_keep_every_bit_of_every_dtype(tensors, codec):
    assert same_bits(decode(encode_payload(tensors, codec=codec)).tensors, tensors)


@given(
    tensors=st.dictionaries(any_name, wide_tensor, max_size=4),
    theirs=st.sampled_from([None, ("zlib", "zstd"), ("zlib", "ans")]),
)
def test_the_preset_lossless_does_with_every_coder_that_the_other_side_may_have(tensors, theirs):
    codec = parse_codec("lossless", STAGES).resolved(theirs)
    data = encode_payload(tensors, codec=codec)
    assert peek_header(data).codec.startswith("planes+")
    assert same_bits(decode(data).tensors, tensors)


@given(tensors=st.dictionaries(any_name, bits_of(torch.int16, (2, 3)), max_size=4), data=st.data())
def test_int8_keeps_integers_and_the_shape_of_updates(tensors, data):
    floats = st.floats(-(2.0**100), 2.0**100, width=32)
    for name in list(tensors):
        drawn = data.draw(st.lists(floats, min_size=6, max_size=6))
        tensors[name + ".f"] = torch.tensor(drawn).reshape(3, 2)
    reference = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    payload = decode(encode_payload(tensors, codec=INT8, reference=reference), reference=reference)
    assert list(payload.tensors) == list(tensors)
    for name, tensor in tensors.items():
        back = payload.tensors[name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
        step = float(tensor.double().abs().max()) / 127 if tensor.is_floating_point() else 0
        error = (back.double() - tensor.double()).abs().max()
        assert error <= max(step, torch.finfo(torch.float32).tiny * (step > 0)) / 2 * (1 + 1e-5)


@given(
    model=st.none() | st.dictionaries(st.text(), plain_json, max_size=3),
    extra=st.none() | st.dictionaries(st.text(), plain_json, max_size=3),
)
def test_model_and_extra_travel_unread(model, extra):
    data = encode_payload({"x": torch.ones(1)}, codec=NONE, model=model, extra=extra)
    header = decode(data).header
    assert (header.model, header.extra) == (model, extra)


@pytest.mark.parametrize("codec", [NONE, LOSSLESS, INT8], ids=lambda codec: codec.name)
@pytest.mark.parametrize("sample", SAMPLE_NAMES)
def test_encoding_is_a_pure_function(codec, sample):
    tensors = finite_sample(sample)
    reference = nearby(tensors)
    data = encode_payload(tensors, codec=codec, reference=reference)
    assert same_bits(tensors, finite_sample(sample))
    assert same_bits(reference, nearby(tensors))
    assert encode_payload(tensors, codec=codec, reference=reference) == data
    back = decode(data, reference=reference).tensors
    assert list(back) == list(tensors)
    for tensor in back.values():
        tensor.zero_()  # writable, and of nobody else's memory
    assert same_bits(reference, nearby(tensors))
    assert list(decode(data, reference=reference).tensors) == list(tensors)


def test_tied_parameters_gradients_and_views_may_be_sent():
    layer = nn.Linear(3, 3)
    tensors = {"a": layer.weight, "tied": layer.weight, "row": layer.weight[1], "t": layer.weight.T}
    for codec in (NONE, LOSSLESS):
        back = decode(encode_payload(tensors, codec=codec)).tensors
        assert same_bits(back, tensors)
        assert not any(tensor.requires_grad for tensor in back.values())


def test_stages_see_plain_tensors():
    class Spy(Stage):
        name = "spy"
        lossless = True

        def encode(self, tensors, *, reference):
            assert all(t.is_contiguous() and not t.requires_grad for t in tensors.values())
            return tensors, {"seen": len(tensors)}

        def decode(self, tensors, notes, *, reference, limit):
            return tensors

    layer = nn.Linear(3, 2)
    data = encode_payload({"w": layer.weight, "t": layer.weight.T}, codec=Codec((Spy(),)))
    assert peek_header(data).notes == [{"seen": 2}]
    assert layer.weight.requires_grad


def test_without_codec_the_payload_is_an_ordinary_safetensors_file():
    tensors = finite_sample("plain")
    data = encode_payload(tensors, codec=NONE)
    loaded = load(data)
    assert same_bits({name: loaded[name] for name in tensors}, tensors)


def test_the_header_says_what_was_really_used():
    tensors = finite_sample("plain")
    reference = nearby(tensors)
    data = encode_payload(tensors, codec=INT8, reference=reference, model={"rank": 3}, extra={})
    header = peek_header(data)
    assert header == decode(data, reference=reference).header
    assert (header.version, header.plugin_version) == (1, __version__)
    assert (header.codec, header.model, header.extra) == ("delta+int8+zlib", {"rank": 3}, {})
    assert header.reference == reference_hash(reference)
    first = encode_payload(tensors, codec=INT8)
    assert (peek_header(first).codec, peek_header(first).reference) == ("zlib", None)
    assert same_bits(decode(first).tensors, tensors)
    unneeded = encode_payload(tensors, codec=LOSSLESS, reference=reference)
    assert peek_header(unneeded).reference is None


def test_without_stages_the_registry_is_asked():
    tensors = finite_sample("plain")
    data = encode_payload(tensors, codec=parse_codec("lossless"))
    assert same_bits(decode_payload(data, limit=10**6).tensors, tensors)


def test_the_reference_is_found_by_its_hash():
    tensors = finite_sample("plain")
    mine, other = nearby(tensors), finite_sample("plain")
    data = encode_payload(tensors, codec=INT8, reference=mine)
    known = {reference_hash(state): state for state in (other, mine)}
    first = decode(data, reference=mine).tensors
    assert same_bits(decode(data, references=known).tensors, first)
    assert same_bits(decode(data, references=known, reference=other).tensors, first)
    with pytest.raises(MismatchError) as refused:
        decode(data, reference=other)
    assert reference_hash(mine) in str(refused.value)
    assert reference_hash(other) in str(refused.value)
    with pytest.raises(MismatchError, match="this side holds none"):
        decode(data)


def test_a_hash_that_the_caller_knows_is_not_computed_again(monkeypatch):
    tensors = finite_sample("plain")
    mine, other = nearby(tensors), finite_sample("plain")
    name, wrong = reference_hash(mine), reference_hash(other)
    small = parse_codec("small", STAGES)
    plain = [
        encode_payload(tensors, codec=INT8, reference=mine),
        encode_with_feedback(tensors, codec=small, reference=mine, residual=None)[0],
    ]
    monkeypatch.setattr("fedpara_plugins.codecs.reference.reference_hash", None)
    known = [
        encode_payload(tensors, codec=INT8, reference=mine, digest=name),
        encode_with_feedback(tensors, codec=small, reference=mine, residual=None, digest=name)[0],
    ]
    assert known == plain
    monkeypatch.undo()
    forged = encode_payload(tensors, codec=INT8, reference=mine, digest=wrong)
    with pytest.raises(MismatchError, match=f"{wrong}, this side holds {name}"):
        decode(forged, reference=mine)
    with pytest.raises(MismatchError, match=f"{wrong}, this side holds {name}"):
        decode(forged, references={name: mine})


@pytest.mark.parametrize("digest", ["", "A" * 64, "0" * 63, "0" * 64 + "\n", b"0" * 64, 64])
def test_what_is_no_hash_is_refused_in_its_place(digest):
    tensors = finite_sample("plain")
    with pytest.raises(PayloadError, match="digest: expected reference_hash"):
        encode_payload(tensors, codec=INT8, reference=nearby(tensors), digest=digest)
    # Where no stage needs a reference, none is named.
    data = encode_payload(tensors, codec=LOSSLESS, reference=tensors, digest=digest)
    assert peek_header(data).reference is None


def test_the_hash_covers_names_dtypes_shapes_and_bits_but_not_the_order():
    base = {"a": torch.zeros(4), "b": torch.zeros(2, dtype=torch.int64)}
    others = [
        {},
        {"a": base["a"]},
        {"a": base["a"], "c": base["b"]},
        {**base, "a": torch.zeros(2, 2)},
        {**base, "a": torch.zeros(4, dtype=torch.int32)},
        {**base, "a": -base["a"]},
        {"b": base["a"], "a": base["b"]},
    ]
    hashes = {reference_hash(state) for state in [base, *others]}
    assert len(hashes) == len(others) + 1
    assert reference_hash(dict(reversed(base.items()))) == reference_hash(base)
    # By the words of docs/payload.md, written out for {"é": int16 [[1, 2]]}.
    words = struct.pack("<Q", 2) + "é".encode() + struct.pack("<Q", 3) + b"I16"
    words += struct.pack("<3Q", 2, 1, 2) + b"\x01\x00\x02\x00"
    state = {"é": torch.tensor([[1, 2]], dtype=torch.int16)}
    assert reference_hash(state) == hashlib.sha256(words).hexdigest()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"x": torch.ones(2, dtype=torch.complex128)}, "complex128 cannot be stored"),
        ({"x": torch.ones(2, 2).to_sparse()}, "'x': expected a dense tensor"),
        ({"x": torch.ones(2, device="meta")}, "'x': expected a dense tensor"),
        ({"x": [1.0]}, "'x': list"),
        ({3: torch.ones(2)}, "3: Tensor"),
        ({"\ud800": torch.ones(2)}, "cannot write"),
        ({"__metadata__": torch.ones(2)}, "reserves it"),
    ],
)
def test_tensors_that_cannot_travel_are_refused_when_encoding(tensors, said):
    with pytest.raises(PayloadError, match=said):
        encode_payload(tensors, codec=NONE)


@pytest.mark.parametrize(
    "extra", [{"x": float("nan")}, {"x": {1, 2}}, {1: 2, "1": 3}, [1], "text", {"x": 10**200}]
)
def test_extra_that_is_no_plain_json_is_refused_when_encoding(extra):
    with pytest.raises(PayloadError):
        encode_payload({}, codec=NONE, extra=extra)
    with pytest.raises(PayloadError):
        encode_payload({}, codec=NONE, model=extra)


def test_the_limit_is_the_bytes_of_the_tensors():
    tensors = finite_sample("buffers")
    size = sum(tensor.nbytes for tensor in tensors.values())
    reference = nearby(tensors)
    for codec in (NONE, LOSSLESS, INT8):
        data = encode_payload(tensors, codec=codec, reference=reference)
        decode(data, reference=reference, limit=size)
        with pytest.raises(PayloadError, match="limit"):
            decode(data, reference=reference, limit=size - 1)


def test_data_that_no_coder_shrinks_still_fits_the_limit():
    noise = {"x": torch.randint(0, 256, (300_000,), dtype=torch.uint8)}
    data = encode_payload(noise, codec=LOSSLESS)
    assert len(data) > 300_000
    assert same_bits(decode(data, limit=300_000).tensors, noise)


def test_small_headers():
    draw = torch.Generator().manual_seed(0)
    two_layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).state_dict()
    data = encode_payload(two_layers, codec=INT8, reference=two_layers, model={"hash": "0" * 64})
    assert 8 + int.from_bytes(data[:8], "little") < 3000
    many = {
        f"features.{layer}.{part}": torch.randn(98, 120, generator=draw)
        for layer in range(31)
        for part in ("x1", "y1", "x2", "y2")
    }
    data = encode_payload(many, codec=INT8, reference=nearby(many))
    assert 8 + int.from_bytes(data[:8], "little") < 0.01 * len(data)


# --- golden bytes: written once by version 1, read for ever -----------------------------------

GOLDEN_PLAIN = {
    "layer.weight": torch.tensor([[1.5, -2.25], [0.0, 1e-40]]),
    "layer.half": torch.tensor([1.0, float("inf")], dtype=torch.bfloat16),
    "steps": torch.tensor(-3),
    "mask": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 2),
}
GOLDEN_REFERENCE = {
    "layer.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
    "layer.half": torch.tensor([8.0, -8.0], dtype=torch.float16),
    "temperature": torch.tensor(0.5),
    "steps": torch.tensor(7),
}
GOLDEN_SENT = {
    # The largest difference is 127/64, so a step is 1/64.
    "layer.weight": torch.tensor([[1.0, 2.0 + 127 / 64, 3.0], [4.0 - 1 / 64, 5.5, 6.0]]),
    "layer.half": torch.tensor([8.0, -8.0 + 127 / 16], dtype=torch.float16),
    "temperature": torch.tensor(0.25),
    "steps": torch.tensor(8),
}
GOLDEN_HASH = "f454dc93e332162826eeb778fd650bc4e1d0b8e330d40ec764db22549917ec4b"


def write_golden():
    """How the files came to be; they are never written again."""
    GOLDEN.mkdir(exist_ok=True)
    extra = {"round": 3, "note": "é"}
    plain = encode_payload(GOLDEN_PLAIN, codec=NONE, model={"method": "none"}, extra=extra)
    (GOLDEN / "v1_none.safetensors").write_bytes(plain)
    coded = encode_payload(GOLDEN_SENT, codec=INT8, reference=GOLDEN_REFERENCE, extra=extra)
    (GOLDEN / "v1_delta_int8_zlib.safetensors").write_bytes(coded)


def test_golden_bytes_without_codec():
    payload = decode((GOLDEN / "v1_none.safetensors").read_bytes())
    assert same_bits(payload.tensors, GOLDEN_PLAIN)
    header = payload.header
    assert (header.version, header.plugin_version, header.codec) == (1, "0.1.0", "none")
    assert (header.reference, header.model) == (None, {"method": "none"})
    assert header.extra == {"round": 3, "note": "é"}
    weight = payload.tensors["layer.weight"]
    assert bytes(tensor_bytes(weight)).hex() == "0000c03f000010c000000000c2160100"


def test_golden_bytes_of_delta_int8_zlib():
    data = (GOLDEN / "v1_delta_int8_zlib.safetensors").read_bytes()
    payload = decode(data, reference=GOLDEN_REFERENCE)
    assert same_bits(payload.tensors, GOLDEN_SENT)
    assert reference_hash(GOLDEN_REFERENCE) == GOLDEN_HASH == payload.header.reference
    assert payload.header.codec == "delta+int8+zlib"
    assert payload.header.notes[1]["each"] == "01--"


def test_the_page_on_the_format_is_enough_to_decode_the_golden_bytes():
    """A decoder by the words of docs/payload.md, without this library's or safetensors' code."""
    data = (GOLDEN / "v1_delta_int8_zlib.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + size])
    place = data.index(b'{\\"crc32\\":\\"') + len(b'{\\"crc32\\":\\"')
    assert int(data[place : place + 8], 16) == zlib.crc32(
        data[:place] + b"00000000" + data[place + 8 :]
    )
    header = json.loads(table["__metadata__"]["fedpara"])
    _, int8, layout = header["notes"]
    start, stop = table["stream"]["data_offsets"]
    plain = zlib.decompress(data[8 + size + start : 8 + size + stop])
    widths = {"I8": 1, "F32": 4, "I64": 8}
    scales = iter(struct.unpack("<2d", base64.b64decode(int8["scales"])))
    found, at = {}, 0
    for name, shape, digit, was in zip(
        layout["names"], layout["shapes"], layout["each"], int8["each"], strict=True
    ):
        kind = layout["dtypes"][int(digit)]
        count = math.prod(shape)
        letter = {"I8": "b", "F32": "f", "I64": "q"}[kind]
        values = struct.unpack_from(f"<{count}{letter}", plain, at)
        at += count * widths[kind]
        step = 1.0 if was == "-" else next(scales)
        found[name] = [value * step for value in values]
    for name, sent in GOLDEN_SENT.items():
        base = GOLDEN_REFERENCE[name].reshape(-1).tolist()
        added = found[name] if not sent.is_floating_point() else [
            x + d for x, d in zip(base, found[name], strict=True)
        ]  # fmt: skip
        assert added == sent.reshape(-1).tolist(), name
