"""Stage cast: float16 or bfloat16, rounded once."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.cast import CastStage
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
