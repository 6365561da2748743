"""Decoding in the memory of the coded tensors: same values, and nobody else's memory changes."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from fedpara_plugins.codecs import Codec, decode_payload, encode_payload, parse_codec
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages import BUILTIN_STAGES, Stage, rans
from fedpara_plugins.stages.ans_symbols import StreamHeader
from fedpara_plugins.stages.handed_over import CHUNK, HandedOver, may_overwrite, working_limit
from fedpara_plugins.testing.samples import same_bits

STAGES = {stage.name: stage for stage in BUILTIN_STAGES}
ODD = 2 * CHUNK + 3
"""More values than are computed at a time, and no multiple of anything."""


def values(dtype, count=ODD, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=draw) * 40).to(dtype)


def both_ways(stage, tensors, reference=None):
    """What a stage decodes from tensors that stay, and from tensors that it may use up."""
    coded, notes = stage.encode(tensors, reference=reference)
    limit = sum(tensor.nbytes for tensor in tensors.values())
    kept = {name: tensor.clone() for name, tensor in coded.items()}
    plain = stage.decode(coded, notes, reference=reference, limit=limit)
    assert same_bits(coded, kept)
    given = HandedOver(kept, lent=frozenset(), working=working_limit(limit))
    used = stage.decode(given, notes, reference=reference, limit=limit)
    assert not set(given) - {"gaps", "stream"}, "all others were taken out"
    return plain, used


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "text",
    [
        *("int8", "quantise:bits=4", "quantise:bits=16", "planes", "topk:share=0.3"),
        *("quantise:bits=4,scope=row", "quantise:bits=5,scope=block,block=300000", "delta", "grid"),
        "quantise:rms=0.01,scope=block,block=17",
    ],
)
def test_used_up_tensors_give_the_same_bits(text, dtype):
    codec = parse_codec(text, STAGES)
    stage = codec.stages[0]
    x = values(dtype)
    if text == "grid":
        x = x.round()
    tensors = {"w": x[: ODD - 3].reshape(8, -1), "v": x[1:], "n": torch.arange(5), "e": x[:0]}
    reference = {name: (t + 3).to(t.dtype) for name, t in tensors.items()}
    plain, used = both_ways(stage, tensors, reference if stage.needs_reference else None)
    assert same_bits(plain, used)
    if stage.lossless:
        assert same_bits(plain, tensors)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.float16])
@pytest.mark.parametrize("count", [2**19, 2**19 + 1, 2**20 + 7])
def test_planes_in_place_of_any_number_of_words(dtype, count):
    x = torch.randint(-(2**15), 2**15, (count,)).to(dtype)
    plain, used = both_ways(STAGES["planes"], {"w": x})
    assert torch.equal(plain["w"], x)
    assert torch.equal(used["w"], x)


def test_the_symbols_of_an_outlier_are_found_in_any_chunk():
    x = values(torch.float32)
    x[[0, CHUNK - 1, CHUNK, ODD - 1]] = 1e5
    plain, used = both_ways(STAGES["quantise"].with_options({"rms": "0.5"}), {"w": x})
    assert torch.equal(plain["w"], used["w"])
    assert (plain["w"] - x).abs().max() <= 0.5 * 1e5 / 127


@pytest.mark.parametrize("codec", ["none", "delta", "quantise:bits=8", "planes", "grid", "small"])
def test_decoded_tensors_have_memory_of_their_own(codec):
    tensors = {"w": values(torch.float32, 2**15), "n": torch.arange(3), "s": torch.tensor(2.0)}
    reference = {name: tensor.clone() for name, tensor in tensors.items()}
    data = encode_payload(tensors, codec=parse_codec(codec), reference=reference)
    before, kept = bytes(bytearray(data)), {n: t.clone() for n, t in reference.items()}
    for _ in range(2):
        decoded = decode_payload(data, limit=10**6, reference=reference).tensors
        assert same_bits({"n": decoded["n"]}, {"n": tensors["n"]})
        for tensor in decoded.values():
            tensor.fill_(7)
    assert data == before
    assert same_bits(reference, kept)


def test_tensors_that_pass_a_chain_unchanged_stay_the_callers():
    """Error feedback decodes the very tensors that the user's model holds."""
    mine = {"w": values(torch.float64, 2**15), "s": torch.tensor(1.0)}
    reference = {name: torch.ones_like(tensor) for name, tensor in mine.items()}
    codec = parse_codec("delta+cast", STAGES)
    coded, notes = codec.encode(mine, reference=reference)
    coded["s"] = coded["w"] = mine["w"]
    notes[1] = {"dtypes": [], "each": "--"}
    kept = mine["w"].clone()
    codec.decode(coded, notes, reference=dict.fromkeys(coded, mine["w"]), limit=10**6)
    assert torch.equal(mine["w"], kept)


class Constant(Stage):
    """A third party's stage that returns what it holds."""

    name = "constant"
    lossless = True
    held = torch.full((2**15,), 5.0)

    def encode(self, tensors, *, reference):
        return {name: torch.zeros(1) for name in tensors}, {}

    def decode(self, tensors, notes, *, reference, limit):
        return dict.fromkeys(tensors, self.held)


def test_what_another_stage_returns_is_not_written_over():
    codec = Codec((STAGES["delta"], Constant()))
    reference = {name: torch.ones(2**15) for name in "ab"}
    coded, notes = codec.encode(reference, reference=reference)
    decoded = codec.decode(coded, notes, reference=reference, limit=10**6)
    assert (Constant.held == 5).all()
    assert all((tensor == 6).all() for tensor in decoded.values())


def test_lent_and_small_tensors_are_not_written_over():
    large, small = torch.zeros(2**16), torch.zeros(4)
    lent = frozenset([large.untyped_storage().data_ptr()])
    given = HandedOver({"l": large, "s": small}, lent=lent, working=0)
    assert not may_overwrite(given, large)
    assert not may_overwrite(given, large[100:].view(torch.uint8))
    assert not may_overwrite(given, small)
    assert not may_overwrite({"l": large}, large)
    assert may_overwrite(HandedOver({"l": large}, lent=frozenset(), working=0), large)


def test_the_peak_counts_what_is_alive_at_a_time():
    tensors = {str(i): torch.zeros(1000, dtype=torch.int8) for i in range(4)}
    given = HandedOver(tensors, lent=frozenset(), working=0)

    def peak(sizes, held=0):
        given.working = 0
        with pytest.raises(PayloadError, match=r"would take \d+ bytes of memory") as refused:
            given.check_peak(sizes, "they", held=held)
        given.working = int(str(refused.value).split()[3])
        given.check_peak(sizes, "they", held=held)
        return given.working

    assert peak([4000] * 4) == 4 * 1000 + 4000 + 3 * 3000
    assert peak([0] * 4) == 4000
    assert peak([500] * 4, held=1000) == 5500
    given.lent = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    assert peak([4000] * 4) == 16000


def test_a_stream_of_one_symbol_is_not_computed(monkeypatch):
    monkeypatch.setattr(rans, "_rows", None)
    count = 10**7
    states = np.full(rans.lanes_for(count), 2**16, "<u4").tobytes()
    table = np.array([2**14, 0], "<u2").tobytes()
    stream = bytearray(StreamHeader(3, 1, 0, 0).packed + zlib.compress(states + table))
    notes = {"names": ["w"], "shapes": [[count]], "dtypes": ["I8"], "each": "0", "coded": "s"}
    tensors = {"stream": torch.frombuffer(stream, dtype=torch.uint8)}
    found = STAGES["ans"].decode(tensors, notes, reference=None, limit=count)["w"]
    assert torch.equal(found, torch.full((count,), 3, dtype=torch.int8))
    broken = np.array([2**16 + 1, *[2**16] * (rans.lanes_for(count) - 1)], "<u4").tobytes()
    stream = bytearray(StreamHeader(3, 1, 0, 0).packed + zlib.compress(broken + table))
    tensors = {"stream": torch.frombuffer(stream, dtype=torch.uint8)}
    with pytest.raises(PayloadError, match="do not end where"):
        STAGES["ans"].decode(tensors, notes, reference=None, limit=count)


@pytest.mark.parametrize("name", ["zlib", "zstd", "ans"])
def test_a_stream_much_longer_than_its_content_is_refused(name):
    """Else megabytes of blocks without content would be read for nothing."""
    notes = {"names": ["w"], "shapes": [[64]], "dtypes": ["U8"], "each": "0"}
    notes |= {"coded": "-"} if name == "ans" else {}
    most = 64 + 1 + 2**16
    for size in (most, most + 1):
        stream = {"stream": torch.zeros(size, dtype=torch.uint8)}
        with pytest.raises(PayloadError) as refused:
            STAGES[name].decode(stream, notes, reference=None, limit=64)
        assert ("are read" in str(refused.value)) == (size > most)


@pytest.mark.parametrize("codec", ["none", "lossless", "small", "delta+topk:share=0.1+zlib"])
def test_more_tensors_than_expected_are_refused_before_they_are_decoded(codec, monkeypatch):
    tensors = {str(i): torch.ones(3, 3) for i in range(20)}
    chosen = parse_codec(codec).resolved(("zlib", "ans"))
    data = encode_payload(tensors, codec=chosen, reference=tensors)
    decode_payload(data, limit=1000, reference=tensors, most_tensors=20)
    monkeypatch.setattr(Codec, "decode", None)
    with pytest.raises(PayloadError, match="tensors, this side expects at most 10"):
        decode_payload(data, limit=1000, reference=tensors, most_tensors=10)


@pytest.mark.parametrize(
    "codec", ["none", "small", "int8", "balanced", "lossless", "topk:share=0.1", "grid+zlib"]
)
def test_the_default_device_of_the_process_does_not_matter(codec):
    tensors = {"w": values(torch.float16, 2**17).round().reshape(2, -1), "e": torch.empty(0)}
    reference = {name: tensor + 2 for name, tensor in tensors.items()}
    data = encode_payload(tensors, codec=parse_codec(codec).resolved(("ans",)), reference=reference)
    expected = decode_payload(data, limit=10**6, reference=reference).tensors
    torch.set_default_device("meta")
    try:
        found = decode_payload(data, limit=10**6, reference=reference).tensors
    finally:
        torch.set_default_device(None)
    assert same_bits(found, expected)
