"""Stage zstd: one frame over all tensors, and life without the library."""

from __future__ import annotations

import math
import sys
import tracemalloc

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fedpara_plugins.codecs import decode_payload, decoders, encode_payload, parse_codec
from fedpara_plugins.errors import ConfigError, MismatchError, PayloadError
from fedpara_plugins.stages.entropy_zstd import MAX_WINDOW, ZstdStage
from fedpara_plugins.testing.samples import finite_sample, same_bits
from fedpara_plugins.testing.stage_contract import StageContract


def stream_of(data):
    return {"stream": torch.tensor(list(data), dtype=torch.uint8)}


def layout(shape, *, dtype="U8"):
    return {"names": ["x"], "shapes": [shape], "dtypes": [dtype], "each": "0"}


def frame(data, **options):
    return zstandard.ZstdCompressor(**options).compress(data)


class TestZstd(StageContract):
    stage = ZstdStage()

    def decode(self, data, notes, *, limit=10**6):
        return self.stage.decode(stream_of(data), notes, reference=None, limit=limit)

    def test_the_stream_is_a_plain_frame(self):
        tensors = {"a": torch.tensor([1, 2], dtype=torch.int16), "b": torch.tensor(True)}
        coded, notes = self.stage.encode(tensors, reference=None)
        packed = bytes(coded["stream"].tolist())
        assert zstandard.ZstdDecompressor().decompress(packed) == b"\x01\x00\x02\x00\x01"
        assert notes["names"] == ["a", "b"]

    def test_fine_symbols_come_within_a_tenth_of_a_bit(self):
        values = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
        symbols = (values / 0.05).round().clamp(-127, 127).to(torch.int8)
        share = torch.bincount(symbols.long() + 127).double() / symbols.numel()
        entropy = -(share[share > 0] * share[share > 0].log2()).sum().item()
        coded, _ = self.stage.encode({"x": symbols}, reference=None)
        assert entropy < 8 * coded["stream"].numel() / symbols.numel() < entropy + 0.1

    def test_a_bomb_costs_no_memory(self):
        bomb = stream_of(frame(bytes(50_000_000)))
        tracemalloc.start()
        try:
            with pytest.raises(PayloadError, match=r"frame of 1000 bytes.* got 50000000"):
                self.stage.decode(bomb, layout([1000]), reference=None, limit=1000)
            with pytest.raises(PayloadError, match="limit"):
                self.stage.decode(bomb, layout([50_000_000]), reference=None, limit=1000)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 200_000

    def test_a_huge_declared_size_behind_a_small_frame_costs_no_memory(self):
        # Magic, an eight-byte size, a window of 1 MiB, a thousand million bytes, an empty block.
        size = (10**9).to_bytes(8, "little")
        forged = frame(b"x")[:4] + bytes([0b11000000, 0x50]) + size + b"\x01\x00\x00"
        tracemalloc.start()
        try:
            with pytest.raises(PayloadError, match=r"no frame of \d+ bytes can hold .* 1000000000"):
                self.decode(forged, layout([10**9]), limit=10**9)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1_000_000

    def test_much_history_is_refused(self):
        wide = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
        data = bytes(range(256)) * 2**17  # 32 MiB, so that the frame asks for them all
        packed = zstandard.ZstdCompressor(compression_params=wide).compress(data)
        assert zstandard.get_frame_parameters(packed).window_size > MAX_WINDOW
        with pytest.raises(PayloadError, match="bytes of history"):
            self.decode(packed, layout([len(data)]), limit=len(data))

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (frame(b"abcd"), "got 4"),
            (frame(b"ab"), "got 2"),
            (frame(b"abc")[:-1], "damaged"),
            (frame(b"abc") + b"x", "damaged"),
            (frame(b"abc") + frame(b"d"), "damaged"),
            (frame(b"abc", write_content_size=False), "frame of 3 bytes"),
            (b"abc", "damaged"),
            (b"", "damaged"),
        ],
        ids=["longer", "shorter", "torn", "trailing", "two", "no size", "no frame", "empty"],
    )
    def test_frames_that_are_not_the_declared_bytes_are_refused(self, data, said):
        with pytest.raises(PayloadError, match=said):
            self.decode(data, layout([3]))

    def test_no_bytes_make_an_empty_stream_and_nothing_else_does(self):
        coded, notes = self.stage.encode({"x": torch.empty(0, 3)}, reference=None)
        assert coded["stream"].numel() == 0
        for other in (b"x", frame(b"")):
            with pytest.raises(PayloadError, match="expected no bytes"):
                self.decode(other, notes)

    @given(st.binary(max_size=200), st.integers(0, 300))
    def test_any_bytes_are_refused_or_decoded(self, data, size):
        self.decode_or_refuse(stream_of(data), layout([size]), None, size)

    @given(st.data())
    def test_any_damaged_frame_is_refused_or_decoded(self, data):
        packed = bytearray(frame(b"What is sent arrives. " * 20))
        for _ in range(data.draw(st.integers(1, 4))):
            packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
        self.decode_or_refuse(stream_of(packed), layout([440]), None, 440)


@pytest.fixture
def without_zstandard(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)  # import_module raises ImportError


def test_zstd_is_offered_where_the_library_is():
    assert decoders() == ("zlib", "ans", "zstd")


class TestWithoutTheLibrary:
    def test_zstd_is_not_offered(self, without_zstandard):
        assert decoders() == ("zlib", "ans")

    def test_choosing_it_says_what_to_install(self, without_zstandard):
        with pytest.raises(ConfigError, match=r"pip install 'fedpara-plugins\[codecs\]'"):
            parse_codec("delta+zstd")

    def test_entropy_takes_what_is_there(self, without_zstandard):
        codec = parse_codec("delta+quantise:bits=8+entropy:prefer=zstd")
        assert "zstd" not in codec.resolved(("zlib", "zstd")).name

    def test_a_payload_that_needs_it_is_refused_with_a_remedy(self, request):
        tensors = finite_sample("plain")
        size = sum(tensor.nbytes for tensor in tensors.values())
        data = encode_payload(tensors, codec=parse_codec("zstd"))
        assert same_bits(decode_payload(data, limit=size).tensors, tensors)
        request.getfixturevalue("without_zstandard")
        with pytest.raises(MismatchError, match=r"zstandard.*fedpara-plugins\[codecs\]"):
            decode_payload(data, limit=size)


def test_the_declared_growth_is_one_that_a_frame_can_have():
    """Zeros are what grows most: the bound must let them pass."""
    zeros = {"x": torch.zeros(30_000_000, dtype=torch.uint8)}
    coded, notes = ZstdStage().encode(zeros, reference=None)
    assert math.isclose(coded["stream"].numel(), 30_000_000 * 4 / 2**17, rel_tol=0.2)
    assert same_bits(ZstdStage().decode(coded, notes, reference=None, limit=30_000_000), zeros)
