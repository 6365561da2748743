"""Adapters of different ranks, told by what torch says of a state that does not fit."""

import pytest
import torch
from torch import nn

from fedpara_plugins.models import rank_conflict, rank_hint


def adapted(rank, out=32):
    layer = nn.Module()
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(16, rank, bias=False)})
    layer.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})
    return nn.ModuleDict({"layer": layer})


def error_of(model, other):
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(other.state_dict())
    return caught.value


def test_an_adapter_of_another_rank():
    hint = rank_hint(error_of(adapted(4), adapted(8)))
    assert "this client's model has rank 4, the server's has rank 8" in hint
    assert "'layer.lora_A.default.weight'" in hint


def test_other_errors_have_no_hint():
    assert rank_hint(error_of(nn.Linear(16, 4), nn.Linear(16, 8))) is None
    assert rank_hint(error_of(adapted(4), nn.Linear(16, 8))) is None
    assert rank_hint(ValueError("rank")) is None


@pytest.mark.parametrize(
    ("name", "mine", "other", "ranks"),
    [
        ("body.q.lora_A.weight", (4, 16), (8, 16), (4, 8)),
        ("body.q.lora_B.default.weight", (16, 4), (16, 8), (4, 8)),
        ("body.q.hada_w1_a", (16, 4), (16, 2), (4, 2)),
        ("body.q.lora_A.weight", (4, 16), (8, 32), None),  # another model
        ("body.q.lora_A.weight", (4, 16), (4,), None),
        ("body.q.weight", (4, 16), (8, 16), None),
    ],
)
def test_ranks_by_shapes(name, mine, other, ranks):
    assert rank_conflict(name, torch.Size(mine), other) == ranks
