"""Stage int8: symmetric, one scale a tensor."""

from __future__ import annotations

import base64
import struct

import pytest
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.int8 import Int8Stage
from fedpara_plugins.testing.stage_contract import StageContract


class TestInt8(StageContract):
    stage = Int8Stage()

    def error_bound(self, tensor, reference):
        # Half a step, and half a unit of the coarsest dtype among the samples, bfloat16; below
        # float32's normal numbers the step is the smallest of them.
        step = max(float(tensor.abs().max()) / 127, torch.finfo(torch.float32).tiny)
        return step / 2 * (1 + 1e-5) + tensor.abs() * torch.finfo(torch.bfloat16).eps

    def round_trip(self, tensor):
        coded, notes = self.stage.encode({"x": tensor}, reference=None)
        return self.stage.decode(coded, notes, reference=None, limit=10**6)["x"]

    def test_known_values(self):
        tensor = torch.tensor([-127.0, -0.6, -0.4, 0.0, 0.4, 0.6, 63.2, 127.0])
        coded, notes = self.stage.encode({"x": tensor}, reference=None)
        assert coded["x"].tolist() == [-127, -1, 0, 0, 0, 1, 63, 127]
        assert notes == {
            "dtypes": ["F32"],
            "each": "0",
            "scales": base64.b64encode(struct.pack("<d", 1.0)).decode(),
        }

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_half_a_step_is_the_largest_error(self, dtype):
        tensor = torch.randn(5000, generator=torch.Generator().manual_seed(1)).to(dtype)
        back = self.round_trip(tensor)
        assert back.dtype == dtype
        step = float(tensor.abs().max()) / 127
        rounding = tensor.double().abs() * torch.finfo(dtype).eps / 2
        assert ((back.double() - tensor.double()).abs() <= step / 2 * (1 + 1e-5) + rounding).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_the_largest_numbers_stay_finite_and_are_not_exceeded(self, dtype):
        top = torch.finfo(dtype).max
        back = self.round_trip(torch.tensor([top, -top, 0.0], dtype=dtype))
        assert torch.isfinite(back).all()
        assert back[0] == -back[1]
        assert abs(float(back[0]) / top - 1) <= torch.finfo(dtype).eps

    def test_zeros_and_empty_tensors(self):
        assert torch.equal(self.round_trip(torch.zeros(2, 3)), torch.zeros(2, 3))
        assert self.round_trip(torch.empty(0, 3)).shape == (0, 3)

    def test_integers_booleans_and_scalars_pass_unchanged(self):
        tensors = {
            "count": torch.tensor(2**40),
            "symbols": torch.tensor([-128, 127], dtype=torch.int8),
            "mask": torch.tensor([True, False]),
            "temperature": torch.tensor(0.123456789),
        }
        coded, notes = self.stage.encode(tensors, reference=None)
        assert notes == {"dtypes": [], "each": "----", "scales": ""}
        back = self.stage.decode(coded, notes, reference=None, limit=100)
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)

    def test_nan_is_named_and_counted(self):
        tensor = torch.ones(3, 4)
        tensor[0, 1] = tensor[2, 2] = float("nan")
        tensor[1, 1] = float("inf")
        with pytest.raises(PayloadError, match=r"'head\.x1': 2 of 12 .*diverged.*lossless"):
            self.stage.encode({"fine": torch.ones(2), "head.x1": tensor}, reference=None)

    @pytest.mark.parametrize(
        "scale", [float("nan"), float("inf"), -1.0, 0.0, 1e-320, 1e300, 3.4e38]
    )
    def test_scales_that_would_overflow_or_are_no_scales_are_refused(self, scale):
        coded, notes = self.stage.encode({"x": torch.ones(2)}, reference=None)
        notes = {**notes, "scales": base64.b64encode(struct.pack("<d", scale)).decode()}
        with pytest.raises(PayloadError, match="scale"):
            self.stage.decode(coded, notes, reference=None, limit=100)

    def test_the_symbol_that_no_encoder_makes_is_refused(self):
        _, notes = self.stage.encode({"x": torch.ones(2)}, reference=None)
        forged = {"x": torch.tensor([-128, 0], dtype=torch.int8)}
        with pytest.raises(PayloadError, match="-128"):
            self.stage.decode(forged, notes, reference=None, limit=100)
