"""The stage fulfils the contract, is found by its name, and survives hostile streams."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import torch
from fedpara_sz3 import Sz3Stage

from fedpara_plugins import ConfigError, PayloadError
from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec, peek_header
from fedpara_plugins.testing import StageContract, damaged

GOLDEN = Path(__file__).with_name("golden.safetensors")
WANTED = torch.linspace(-1, 1, 64).sin()
LIMIT = 10**6


class TestSz3(StageContract):
    stage = Sz3Stage(1e-3)

    def error_bound(self, tensor, reference):
        return 1e-3


@pytest.mark.parametrize("error", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_keeps_the_bound_that_its_text_states(error, dtype):
    draw = torch.Generator().manual_seed(0)
    reference = {"w": torch.randn(64, 48, generator=draw, dtype=dtype), "n": torch.tensor(3)}
    tensors = {
        "w": reference["w"] + torch.randn(64, 48, generator=draw, dtype=dtype),
        "n": reference["n"],
    }
    codec = parse_codec(f"delta+sz3:error={error}")
    data = encode_payload(tensors, codec=codec, reference=reference)
    assert peek_header(data).codec == "delta+sz3"
    back = decode_payload(data, reference=reference, limit=LIMIT).tensors
    wrong = (back["w"] - tensors["w"]).abs().max().item()
    assert wrong <= error + 8 * torch.finfo(dtype).eps
    assert wrong > error / 10 or error < 1e-5  # finer than SZ3 takes for worth a step
    assert torch.equal(back["n"], tensors["n"])


def test_a_larger_error_takes_fewer_bytes():
    tensors = {"w": torch.randn(100_000, generator=torch.Generator().manual_seed(0))}
    sizes = [
        len(encode_payload(tensors, codec=parse_codec(f"sz3:error={error}")))
        for error in (1e-1, 1e-2, 1e-3)
    ]
    assert sizes[0] < sizes[1] < sizes[2] < 400_000 / 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sz3:error=0", "positive number, got '0'"),
        ("sz3:error=nan", "positive number, got 'nan'"),
        ("sz3:error=inf", "positive number"),
        ("sz3:error=x", "positive number, got 'x'"),
        ("sz3:bits=4", "no option 'bits'; known: error"),
        ("sz3+delta", "'delta' needs the plain tensors"),
    ],
)
def test_wrong_options_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_codec(text)


def test_the_text_reads_back_to_the_same_stage():
    assert parse_codec("delta+sz3:error=0.001").name == "delta+sz3:error=0.001"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_without_a_distance_are_refused(value):
    with pytest.raises(PayloadError, match="'w': 1 of 2 values"):
        encode_payload({"w": torch.tensor([1.0, value])}, codec=parse_codec("sz3"))


def test_golden_bytes():
    back = decode_payload(GOLDEN.read_bytes(), limit=LIMIT).tensors
    assert (back["w"] - WANTED).abs().max() <= 1e-3


def test_damaged_streams_are_refused_or_stay_within_the_limit():
    tensors = {"w": torch.randn(40, 50, generator=torch.Generator().manual_seed(0)), "b": WANTED}
    size = sum(tensor.nbytes for tensor in tensors.values())
    data = encode_payload(tensors, codec=parse_codec("sz3"))
    draw, refused = random.Random(0), 0
    for _ in range(5000):
        try:
            payload = decode_payload(damaged(data, draw), limit=size)
        except PayloadError:
            refused += 1
        else:
            assert sum(tensor.nbytes for tensor in payload.tensors.values()) <= size
    assert 1000 < refused < 5000


def test_streams_that_end_early_are_refused_or_lack_nothing():
    """Of the settings at the end of a stream, SZ3 reads some only where they are there."""
    stage = Sz3Stage()
    coded, notes = stage.encode({"w": WANTED}, reference=None)
    whole = stage.decode(coded, notes, reference=None, limit=LIMIT)["w"]
    refused = 0
    for length in range(len(coded["w"])):
        try:
            back = stage.decode({"w": coded["w"][:length]}, notes, reference=None, limit=LIMIT)
        except PayloadError:
            refused += 1
        else:
            assert torch.equal(back["w"], whole)
    assert refused > len(coded["w"]) - 10


@pytest.mark.parametrize("declared", [10**6, 2**31, 2**40, 2**64 - 1])
def test_a_stream_that_declares_a_huge_inner_size_is_refused_before_the_library_sees_it(declared):
    stage = Sz3Stage()
    coded, notes = stage.encode({"w": WANTED}, reference=None)
    forged = bytearray(coded["w"].numpy().tobytes())
    forged[16:24] = struct.pack("<Q", declared)
    stream = torch.frombuffer(forged, dtype=torch.uint8)
    with pytest.raises(PayloadError, match=f"declares {declared} bytes"):
        stage.decode({"w": stream}, notes, reference=None, limit=LIMIT)
