"""Stage planes: bytes sorted by their weight."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.planes import PlanesStage
from fedpara_plugins.stages.stage import DTYPES
from fedpara_plugins.testing.samples import same_bits
from fedpara_plugins.testing.stage_contract import StageContract

STAGE = PlanesStage()


def encode(tensor):
    coded, notes = STAGE.encode({"x": tensor}, reference=None)
    return coded["x"], notes


class TestPlanes(StageContract):
    stage = PlanesStage()

    def test_integers_count_away_from_zero(self):
        coded, notes = encode(torch.tensor([0, -1, 1, -2, 300, -(2**15)], dtype=torch.int16))
        assert coded.tolist() == [[0, 1, 2, 3, 88, 255], [0, 0, 0, 0, 2, 255]]
        assert notes == {"dtypes": ["I16"], "each": "0"}

    def test_the_exponent_of_a_float_is_the_last_plane_and_its_sign_the_lowest_bit(self):
        values = [1.0, -1.0, 1.5, 2.0**-20, -0.0, float("inf")]
        coded, _ = encode(torch.tensor(values))
        assert coded.shape == (4, 6)
        assert coded[3].tolist() == [127, 127, 127, 107, 0, 255]
        assert (coded[0] & 1).tolist() == [0, 1, 0, 0, 1, 0]

    @given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
    def test_any_bits_are_sorted_as_the_page_says(self, bits):
        tensor = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.int32)).view(
            torch.float32
        )
        coded, notes = encode(tensor)
        turned = [struct.pack("<I", (word << 1 | word >> 31) & 2**32 - 1) for word in bits]
        assert coded.tolist() == [[word[place] for word in turned] for place in range(4)]
        back = STAGE.decode({"x": coded}, notes, reference=None, limit=4 * len(bits))
        assert same_bits(back, {"x": tensor})

    def test_bytes_and_single_values_pass(self):
        passed = {
            "bytes": torch.arange(4, dtype=torch.int8),
            "one": torch.tensor(3.5),
            "complex": torch.ones(2, dtype=torch.complex64),
        }
        coded, notes = STAGE.encode(passed, reference=None)
        assert same_bits(coded, passed)
        assert notes["each"] == "---"

    @pytest.mark.parametrize("dtype", ["U16", "I8", "BOOL", "C64"])
    def test_planes_of_another_type_are_refused(self, dtype):
        notes = {"dtypes": [dtype], "each": "0"}
        planes = torch.zeros(DTYPES[dtype].itemsize, 3, dtype=torch.uint8)
        with pytest.raises(PayloadError, match=f"planes of uint8 for {dtype}"):
            STAGE.decode({"x": planes}, notes, reference=None, limit=100)

    @pytest.mark.parametrize("shape", [(3, 4), (12,), (5, 4), (0, 4)])
    def test_another_number_of_planes_is_refused(self, shape):
        notes = {"dtypes": ["F32"], "each": "0"}
        planes = torch.zeros(shape, dtype=torch.uint8)
        with pytest.raises(PayloadError, match="expected 4 planes"):
            STAGE.decode({"x": planes}, notes, reference=None, limit=100)

    def test_trained_like_weights_shrink_more(self):
        weights = {"x": torch.randn(40_000, generator=torch.Generator().manual_seed(0)) * 0.02}
        plain, sorted_ = (
            len(encode_payload(weights, codec=parse_codec(text)))
            for text in ("zlib", "planes+zlib")
        )
        assert sorted_ < 0.96 * plain
        data = encode_payload(weights, codec=parse_codec("planes+zlib"))
        assert same_bits(decode_payload(data, limit=160_000).tensors, weights)
