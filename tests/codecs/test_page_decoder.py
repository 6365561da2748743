"""The decoder that was written by the words of docs/payload.md alone agrees with this library's."""

from __future__ import annotations

import pytest
import torch
from page_decoder import (
    LETTERS,
    by_the_page,
    description_by_the_page,
    dictionary,
    joint_by_the_page,
    roll_by_the_page,
)

from fedpara_plugins.codecs import (
    Description,
    HeaderForm,
    Roll,
    RollRow,
    decode_payload,
    encode_payload,
    join_payloads,
    parse_codec,
    reference_hash,
)
from fedpara_plugins.codecs.header_packing import WORDS
from fedpara_plugins.stages.stage import DTYPES
from fedpara_plugins.testing.samples import SAMPLE_NAMES, finite_sample, nearby

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def heavy():
    """Values far out, so that some symbols escape, in several tensors; halves and doubles."""
    draw = torch.Generator().manual_seed(3)
    wide = torch.randn(40, 33, generator=draw) * torch.randn(40, 33, generator=draw).exp() ** 2
    small = (wide[:9, :30] / wide.abs().max()).clone()
    return {"z": wide, "a": small.half(), "m": small.bfloat16(), "d": wide.double(), "n": wide[0]}


STATES = {**{name: lambda name=name: finite_sample(name) for name in SAMPLE_NAMES}, "heavy": heavy}


CODECS = [
    "quantise:bits=5",
    "quantise:rms=0.05+zlib",
    "quantise:rms=2,scope=row+zlib",
    "quantise:bits=12,scope=block,block=16,rounding=stochastic+zlib",
    "topk:share=0.1+quantise:rms=0.05,scope=row",
    "topk:count=2+zlib",
    "cast:to=bf16+zlib",
    "delta+quantise:rms=0.05+ans",
    "delta+quantise:bits=12,scope=row+zstd",
    "delta+int8+ans",
    "delta+cast:to=fp16+planes+zlib",
    "planes+zstd",
    "grid+ans",
]


def sample(name, codec):
    tensors = STATES[name]()
    if "cast" in codec and name == "extremes":
        # Beyond bfloat16 by intent, and beyond float16.
        tensors["large"] = tensors["large"] / (2 if "bf16" in codec else 2.0**113)
    return tensors, nearby(tensors)


def check_same(found, ours, tensors):
    assert list(found) == list(ours) == list(tensors)
    for key, (kind, shape, values) in found.items():
        assert (kind, tuple(shape)) == (NAMES[ours[key].dtype], ours[key].shape)
        flat = ours[key].reshape(-1)
        if kind not in LETTERS and kind != "BF16":
            flat = flat.view(torch.uint8)
        assert values == flat.tolist(), key


def held(reference):
    return by_the_page(encode_payload(reference, codec=parse_codec("none")))


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("codec", CODECS)
def test_the_page_is_enough_to_decode(name, codec):
    tensors, reference = sample(name, codec)
    data = encode_payload(tensors, codec=parse_codec(codec), reference=reference)
    ours = decode_payload(data, reference=reference, limit=10**6).tensors
    check_same(by_the_page(data, held(reference)), ours, tensors)


MODEL = {"seed": 3, "weights": [["a\u00e9\n\U0001f600", [1e-05, 2.0, 0.1]]], "x\x7f": [True, None]}


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("codec", CODECS)
def test_the_page_is_enough_to_decode_version_2(name, codec, described):
    tensors, reference = sample(name, codec)
    digest, text = description_by_the_page(MODEL, held(reference))
    known = Description.of(MODEL, reference)
    assert (known.digest, known.text) == (digest.hex(), text.decode())
    form = HeaderForm(known if described else None)
    data = encode_payload(
        tensors, codec=parse_codec(codec), reference=reference, model=MODEL, form=form
    )
    assert data[12:28] == (digest if described else bytes(16))
    ours = decode_payload(
        data, reference=reference, limit=10**6, descriptions={known.digest: known}
    )
    assert (ours.header.model, ours.header.version) == (MODEL, 2)
    check_same(by_the_page(data, held(reference), {digest: text}), ours.tensors, tensors)


@pytest.mark.parametrize("rolled", [True, False])
@pytest.mark.parametrize("codec", ["delta+quantise:rms=0.05+ans", "planes+zlib", "delta+int8+ans"])
def test_the_page_is_enough_to_decode_joint_payloads(codec, rolled):
    names = ["heavy", *SAMPLE_NAMES[:3]]
    pairs = {name: sample(name, codec) for name in names}
    known = {name: Description.of(MODEL, reference) for name, (_, reference) in pairs.items()}
    texts = {bytes.fromhex(each.digest): each.text.encode() for each in known.values()}
    rows = [
        (name, known[name].digest, reference_hash(reference), len(reference))
        for name, (_, reference) in pairs.items()
    ]
    roll = Roll(tuple(RollRow(*row) for row in rows))
    digest, text = roll_by_the_page(rows)
    assert (roll.digest, roll.text) == (digest.hex(), text.decode())
    payloads = {
        name: encode_payload(
            tensors, codec=parse_codec(codec), reference=reference, model=MODEL,
            form=HeaderForm(known[name]),
        )
        for name, (tensors, reference) in pairs.items()
    }  # fmt: skip
    # A further record has the description of another, as an optimizer's has the model's.
    again = {**payloads, "twin": payloads["heavy"]}
    counts = dict.fromkeys(again, 3)
    data = join_payloads(again, roll=roll if rolled else Roll(()), tensors=counts)
    references = {name: held(pairs["heavy" if name == "twin" else name][1]) for name in again}
    found = joint_by_the_page(data, references, texts, {digest: text})
    assert list(found) == list(again)
    for name in again:
        tensors, reference = pairs["heavy" if name == "twin" else name]
        ours = decode_payload(
            again[name], reference=reference, limit=10**6,
            descriptions={each.digest: each for each in known.values()},
        ).tensors  # fmt: skip
        check_same(found[name], ours, tensors)


def test_the_dictionary_is_the_pages():
    assert dictionary() == WORDS


def test_the_sample_with_far_values_does_escape():
    data = encode_payload(heavy(), codec=parse_codec("quantise:rms=0.05"))
    assert b'\\"far\\":0' not in data
