"""Stages cast and topk."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.cast import CastStage
from fedpara_plugins.stages.topk import TopkStage
from fedpara_plugins.testing.stage_contract import StageContract


def round_trip(stage, tensor):
    coded, notes = stage.encode({"x": tensor}, reference=None)
    return stage.decode(coded, notes, reference=None, limit=10**8)["x"]


class TestBfloat16(StageContract):
    stage = CastStage().with_options({"to": "bf16"})

    def sample(self, name):
        # What bfloat16 cannot hold is refused by intent; tested below.
        top = torch.finfo(torch.bfloat16).max
        return {
            key: value.clamp(-top, top) if value.dtype in (torch.float32, torch.float64) else value
            for key, value in super().sample(name).items()
        }

    def error_bound(self, tensor, reference):
        return tensor.abs() * 2**-8 + torch.finfo(torch.bfloat16).tiny


@pytest.mark.parametrize(("to", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_values_are_rounded_once_as_torch_does(to, dtype):
    tensor = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    stage = CastStage().with_options({"to": to})
    coded, _ = stage.encode({"x": tensor}, reference=None)
    assert coded["x"].dtype == dtype
    back = round_trip(stage, tensor)
    assert back.dtype == torch.float32
    assert torch.equal(back, tensor.to(dtype).float())


def test_values_beyond_float16_are_refused_with_the_remedy():
    tensor = torch.tensor([[1.0, 70000.0]])
    with pytest.raises(PayloadError, match=r"'layer'.*bf16"):
        CastStage().with_options({"to": "fp16"}).encode({"layer": tensor}, reference=None)


class TestTopk(StageContract):
    stage = TopkStage(share=0.1)

    def error_bound(self, tensor, reference):
        return tensor.abs()  # a value is kept, or becomes zero


def test_the_largest_values_are_kept_exactly_and_the_rest_is_zero():
    tensor = torch.randn(60, 70, generator=torch.Generator().manual_seed(2))
    back = round_trip(TopkStage(share=0.05), tensor)
    kept = 210
    threshold = tensor.abs().flatten().sort(descending=True).values[kept - 1]
    assert torch.equal(back, torch.where(tensor.abs() >= threshold, tensor, 0.0))


def test_a_count_and_positions_far_apart():
    tensor = torch.zeros(50, 2000)
    tensor[0, 1], tensor[20, 700], tensor[49, 1999] = 3.0, -2.0, 1.0
    assert torch.equal(round_trip(TopkStage(None, 3), tensor), tensor)


def test_vectors_and_what_would_save_nothing_pass_whole():
    for tensor in (torch.randn(1000), torch.randn(1, 1), torch.arange(400).view(20, 20)):
        assert torch.equal(round_trip(TopkStage(share=0.01), tensor), tensor)


def test_a_position_outside_is_refused():
    stage = TopkStage(share=0.05)
    coded, notes = stage.encode({"x": torch.randn(20, 20)}, reference=None)
    notes["shapes"] = [[2, 10]]
    with pytest.raises(PayloadError, match="position"):
        stage.decode(coded, notes, reference=None, limit=10**6)
