"""Stage topk: the largest values, and where they stand."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.topk import TopkStage
from fedpara_plugins.testing.stage_contract import StageContract


def round_trip(stage, tensor):
    coded, notes = stage.encode({"x": tensor}, reference=None)
    return stage.decode(coded, notes, reference=None, limit=10**8)["x"]


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
