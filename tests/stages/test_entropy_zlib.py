"""Stage zlib: one stream over all tensors."""

from __future__ import annotations

import math
import tracemalloc
import warnings
import zlib

import pytest
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.entropy_zlib import ZlibStage
from fedpara_plugins.stages.stage import tensor_bytes
from fedpara_plugins.testing.samples import same_bits
from fedpara_plugins.testing.stage_contract import StageContract

NAN_BITS = [0x7FC00000, 0x7F800001, 0xFFC12345]  # quiet, signalling, negative with a payload


def stream_of(data):
    return {"stream": torch.tensor(list(data), dtype=torch.uint8)}


def layout(shape, *, dtype="U8"):
    return {"names": ["x"], "shapes": [shape], "dtypes": [dtype], "each": "0"}


class TestZlib(StageContract):
    stage = ZlibStage()

    def decode(self, data, notes, *, limit=10**6):
        return self.stage.decode(stream_of(data), notes, reference=None, limit=limit)

    def test_nan_keeps_its_bits(self):
        bits = torch.tensor(NAN_BITS, dtype=torch.int64).to(torch.int32)
        tensors = {"x": bits.view(torch.float32), "y": bits.view(torch.bfloat16)}
        coded, notes = self.stage.encode(tensors, reference=None)
        assert same_bits(self.stage.decode(coded, notes, reference=None, limit=100), tensors)

    def test_the_stream_is_plain_zlib(self):
        tensors = {"a": torch.tensor([1, 2], dtype=torch.int16), "b": torch.tensor(True)}
        coded, notes = self.stage.encode(tensors, reference=None)
        assert zlib.decompress(bytes(coded["stream"].tolist())) == b"\x01\x00\x02\x00\x01"
        assert notes == {
            "names": ["a", "b"],
            "shapes": [[2], []],
            "dtypes": ["I16", "BOOL"],
            "each": "01",
        }

    def test_int8_symbols_come_within_a_hundredth_of_their_entropy(self):
        draw = torch.Generator().manual_seed(0)
        values = torch.randn(200_000, generator=draw)
        symbols = (values / values.abs().max() * 127).round().to(torch.int8)
        share = torch.bincount(symbols.long() + 127).double() / symbols.numel()
        share = share[share > 0]
        entropy = -(share * share.log2()).sum().item() * symbols.numel() / 8
        coded, _ = self.stage.encode({"x": symbols}, reference=None)
        assert entropy < coded["stream"].numel() < 1.01 * entropy

    def test_untouched_parts_cost_next_to_nothing(self):
        coded, _ = self.stage.encode({"x": torch.zeros(10**6, dtype=torch.int8)}, reference=None)
        assert coded["stream"].numel() < 10**6 / 500

    def test_noise_is_stored_and_what_stands_between_still_shrinks(self):
        draw = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (3, 6 * 8192), dtype=torch.uint8, generator=draw)
        symbols = (2 * torch.randn(3, 50_000, generator=draw)).round().to(torch.int8)
        pairs = zip(noise, symbols, strict=True)
        tensors = {f"{i}{kind}": t for i, two in enumerate(pairs) for kind, t in enumerate(two)}
        coded, notes = self.stage.encode(tensors, reference=None)
        packed = bytes(coded["stream"].tolist())
        assert zlib.decompress(packed) == b"".join(bytes(tensor_bytes(t)) for t in tensors.values())
        for row in noise:
            assert bytes(row[8192 : 2 * 8192].tolist()) in packed
        alone, _ = self.stage.encode({"x": symbols}, reference=None)
        assert len(packed) < noise.numel() * 1.001 + alone["stream"].numel() * 1.02
        back = self.stage.decode(coded, notes, reference=None, limit=10**6)
        assert same_bits(back, tensors)

    @pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
    def test_a_byte_of_noise_in_each_value_is_no_noise(self, dtype):
        draw = torch.Generator().manual_seed(0)
        values = torch.randint(0, 256, (100_000,), generator=draw).to(dtype)
        coded, _ = self.stage.encode({"x": values}, reference=None)
        assert coded["stream"].numel() < 0.75 * values.nbytes

    def test_decoded_tensors_have_memory_of_their_own(self):
        tensors = {"a": torch.arange(4.0), "b": torch.arange(4.0)}
        coded, notes = self.stage.encode(tensors, reference=None)
        before = torch.is_warn_always_enabled()
        torch.set_warn_always(True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # torch warns of tensors over read-only bytes
                back = self.stage.decode(coded, notes, reference=None, limit=100)
        finally:
            torch.set_warn_always(before)
        back["a"].zero_()
        assert back["a"].untyped_storage().nbytes() == 16
        assert torch.equal(back["b"], tensors["b"])

    def test_a_bomb_costs_no_memory(self):
        bomb = stream_of(zlib.compress(bytes(50_000_000), 9))
        tracemalloc.start()
        try:
            with pytest.raises(PayloadError, match="more"):
                self.stage.decode(bomb, layout([1000]), reference=None, limit=1000)
            with pytest.raises(PayloadError, match="limit"):
                self.stage.decode(bomb, layout([50_000_000]), reference=None, limit=1000)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 700_000

    def test_a_huge_declared_size_behind_a_small_stream_costs_no_memory(self):
        tracemalloc.start()
        try:
            with pytest.raises(PayloadError, match=r"after 1000000000 bytes, got 3"):
                self.decode(zlib.compress(b"abc"), layout([10**9]), limit=10**9)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1_000_000

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (zlib.compress(b"abcd"), "got more"),
            (zlib.compress(b"ab"), "got 2"),
            (zlib.compress(b"abc")[:-1], "ends after 3"),
            (zlib.compress(b"abc") + b"x", "bytes after its end"),
            (zlib.compress(b"abc")[:-1] + b"\x00", "damaged"),
            (b"abc", "damaged"),
            (b"", "got 0"),
        ],
        ids=["longer", "shorter", "torn", "trailing", "wrong check", "no stream", "empty"],
    )
    def test_streams_that_are_not_the_declared_bytes_are_refused(self, data, said):
        with pytest.raises(PayloadError, match=said):
            self.decode(data, layout([3]))

    @pytest.mark.parametrize(
        "notes",
        [
            layout([3], dtype="F4"),
            layout([-3]),
            layout([True, 3]),
            layout([3.0]),
            layout([2**64, 0]),
            layout([2**40, 2**40, 0]),
            {**layout([3]), "names": ["x", "x"], "shapes": [[1], [2]], "each": "00"},
            {**layout([3]), "each": "-"},
            {**layout([3]), "each": "1"},
            {**layout([3]), "shapes": [[3], [0]]},
        ],
    )
    def test_layouts_that_no_encoder_makes_are_refused(self, notes):
        size = math.prod(notes["shapes"][0]) if notes["names"] == ["x"] else 3
        with pytest.raises(PayloadError):
            self.decode(zlib.compress(bytes(max(0, int(size)))), notes)

    @pytest.mark.parametrize(
        "change",
        [
            lambda stream: {"stream": stream.view(torch.int8)},
            lambda stream: {"stream": stream.unsqueeze(0)},
            lambda stream: {"stream": stream, "more": stream},
            lambda stream: {"other": stream},
            lambda stream: {},
        ],
    )
    def test_anything_but_one_stream_is_refused(self, change):
        stream = stream_of(zlib.compress(b"abc"))["stream"]
        with pytest.raises(PayloadError, match="expected one uint8 tensor 'stream'"):
            self.stage.decode(change(stream), layout([3]), reference=None, limit=3)

    def test_booleans_other_than_0_and_1_are_refused(self):
        with pytest.raises(PayloadError, match="boolean"):
            self.decode(zlib.compress(b"\x00\x02"), layout([2], dtype="BOOL"))
