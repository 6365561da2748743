"""Stage delta: x - r, then r + d."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.stages.delta import DeltaStage
from fedpara_plugins.testing.stage_contract import StageContract


class TestDelta(StageContract):
    stage = DeltaStage()

    def error_bound(self, tensor, reference):
        # bfloat16, the coarsest dtype of the samples.
        return torch.finfo(torch.bfloat16).eps * (tensor.abs() + reference.abs())

    def round_trip(self, tensor, reference):
        coded, notes = self.stage.encode({"x": tensor}, reference={"x": reference})
        return self.stage.decode(coded, notes, reference={"x": reference}, limit=10**6)["x"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_the_difference_is_rounded_once_to_the_tensors_own_dtype(self, dtype):
        draw = torch.Generator().manual_seed(0)
        reference = torch.randn(1000, generator=draw).to(dtype)
        tensor = torch.randn(1000, generator=draw).to(dtype)
        coded, _ = self.stage.encode({"x": tensor}, reference={"x": reference})
        exact = tensor.double() - reference.double()
        assert coded["x"].dtype == dtype
        assert torch.equal(coded["x"], exact.to(dtype))
        error = (self.round_trip(tensor, reference).double() - tensor.double()).abs()
        bound = torch.finfo(dtype).eps * (tensor.double().abs() + reference.double().abs())
        assert (error <= bound).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_small_updates_come_back_exactly(self, dtype):
        reference = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
        tensor = reference * 1.25
        assert torch.equal(self.round_trip(tensor, reference), tensor)

    def test_integers_and_booleans_pass_without_a_counterpart(self):
        tensors = {"count": torch.tensor([3]), "mask": torch.tensor([True, False])}
        coded, _ = self.stage.encode(tensors, reference={})
        assert all(torch.equal(coded[name], tensors[name]) for name in tensors)

    def test_non_finite_values_stay_non_finite(self):
        tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
        back = self.round_trip(tensor, torch.ones(4))
        torch.testing.assert_close(back, tensor, rtol=0, atol=0, equal_nan=True)

    def test_a_difference_that_overflows_is_refused(self):
        tensor = torch.tensor([60000.0, 1.0], dtype=torch.float16)
        with pytest.raises(PayloadError, match=r"'x': 1 of 2 finite values.*float16"):
            self.round_trip(tensor, -tensor)

    @pytest.mark.parametrize(
        ("reference", "said"),
        [
            ({"other": torch.ones(2)}, "'x' is not in the reference"),
            ({"x": torch.ones(3)}, r"'x' is \(2,\) torch.float32, in the reference \(3,\)"),
            ({"x": torch.ones(2).double()}, "in the reference .* torch.float64"),
        ],
    )
    def test_a_reference_that_does_not_fit_is_named(self, reference, said):
        tensors = {"x": torch.ones(2)}
        with pytest.raises(MismatchError, match=said):
            self.stage.encode(tensors, reference=reference)
        with pytest.raises(MismatchError, match=said):
            self.stage.decode(tensors, {}, reference=reference, limit=10**6)
