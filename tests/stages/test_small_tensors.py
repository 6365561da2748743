"""Small tensors are decoded many at a time, to what each gives alone, and at few calls for each."""

from __future__ import annotations

import sys

import pytest
import torch

from fedpara_plugins import PayloadError
from fedpara_plugins.codecs import Codec, decode_payload, encode_payload, parse_codec
from fedpara_plugins.stages import (
    entropy_layout,
    int8,
    planes,
    quantise,
    quantise_notes,
    small_tensors,
)

CODECS = (
    *("none", "lossless", "int8", "zlib", "planes", "planes+zlib", "cast"),
    *("balanced", "small", "tiny", "delta+int8", "quantise:bits=4,scope=row+zlib"),
    *(
        "quantise:bits=4,scope=block,block=16",
        "quantise:bits=6",
        "topk:share=0.5+zlib",
        "grid+zlib",
    ),
)
BUILTIN = {
    "int8": int8.Int8Stage(),
    "quantise": quantise.QuantiseStage(),
    "planes": planes.PlanesStage(),
}
SHAPES = ((4,), (), (1,), (0,), (3, 2), (2, 3, 4), (0, 5), (5, 0), (33, 7), (5000,), (70, 300))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16)


def state(seed, dtypes=DTYPES):
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for number, shape in enumerate(SHAPES * 3):
        for dtype in dtypes:
            values = 8 * torch.randn(shape, generator=draw)
            if number % 3 == 1 and values.numel():
                values.view(-1)[::16] *= 500  # some symbols escape
            found[f"{number}.{dtype}"] = values.to(dtype)
    return found


@pytest.mark.parametrize("text", CODECS)
def test_together_is_as_each_alone(text, monkeypatch):
    codec = parse_codec(text).resolved(None)
    kinds = (torch.float32, torch.int64) if "grid" in text else DTYPES
    tensors, reference = state(0, kinds), state(1, kinds)
    data = encode_payload(tensors, codec=codec, reference=reference)
    found = decode_payload(data, reference=reference, limit=10**7).tensors
    for module in (planes, quantise, quantise_notes, int8):
        monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr(entropy_layout, "_SMALL", 0)
    expected = decode_payload(data, reference=reference, limit=10**7).tensors
    assert list(found) == list(tensors) == list(expected)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], expected[name]), name
        assert found[name].untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("text", ["int8", "quantise", "planes"])
def test_a_forged_one_of_many_is_named(text):
    codec = Codec((BUILTIN[text],))
    coded, notes = codec.encode(
        {f"{i}": torch.full((4,), 1.0 + i) for i in range(50)}, reference=None
    )
    coded = dict(coded)
    if text == "planes":
        coded["31"] = coded["31"][:3]
    elif text == "int8":
        coded["31"] = torch.full((4,), -128, dtype=torch.int8)
    else:
        coded["31"] = torch.full((4,), 2**30, dtype=torch.int32)
        notes = [{**notes[0], "steps": _largest(notes[0]["steps"], 31)}]
    with pytest.raises(PayloadError, match="'31'"):
        codec.decode(coded, notes, reference=None, limit=10**6)


def _largest(steps, place):
    """Let one step be so large that products with it are infinite."""
    import base64
    import struct

    values = list(struct.unpack("<50f", base64.b64decode(steps)))
    values[place] = 3e38
    return base64.b64encode(struct.pack("<50f", *values)).decode()


@pytest.mark.parametrize(
    ("text", "most"),
    [("none", 70), ("zlib", 32), ("lossless", 60), ("int8", 95), ("balanced", 110), ("tiny", 110)],
)
def test_a_small_tensor_costs_few_calls(text, most, monkeypatch):
    """Calls of Python and of torch for each tensor; hundreds of them would take 0.1 ms."""
    count = 2000
    reference = {f"layer{i}.weight": torch.randn(4) for i in range(count)}
    tensors = {name: value + 0.01 for name, value in reference.items()}
    codec = parse_codec(text).resolved(None)
    data = encode_payload(tensors, codec=codec, reference=reference)
    calls = 0

    def note(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    for module, name in ((planes, "_from_planes"), (quantise, "dequantise")):
        monkeypatch.setattr(module, name, None)  # none is decoded alone
    sys.setprofile(note)
    try:
        decode_payload(data, reference=reference, limit=16 * count)
    finally:
        sys.setprofile(None)
    assert calls / count < most


def test_batches_are_bounded():
    tensors = {f"{i}": torch.zeros(1000) for i in range(100)}
    kinds = {name: int(name) % 2 for name in tensors}
    found = list(small_tensors.batches(tensors, kinds))
    assert sorted(name for _, names in found for name in names) == sorted(tensors)
    assert all(kinds[name] == kind for kind, names in found for name in names)
    assert max(len(names) for _, names in found) == 17  # 64 KiB
