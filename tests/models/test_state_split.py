"""The shared and the private part of a state, and the whole made of them again."""

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ModelSpec, PayloadError


def net():
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 32))


def converted(**options):
    return fedpara.convert(net(), **{"method": "pfedpara", "gamma": 0.5, **options})


def test_split_and_merge_give_the_state_back_in_order():
    model = converted()
    parts = fedpara.split(model)
    assert list(parts.private) == ["0.x2", "0.y2", "2.x2", "2.y2"]
    whole = fedpara.merge(ModelSpec.of(model), parts.shared, parts.private)
    assert list(whole) == list(model.state_dict())
    converted().load_state_dict(whole, strict=True)


def test_nothing_is_private_without_pfedpara():
    for method in ("none", "lowrank", "fedpara"):
        assert fedpara.split(fedpara.convert(net(), method=method)).private == {}


def test_merge_refuses_what_does_not_fit():
    model = converted()
    parts = fedpara.split(model)
    spec = ModelSpec.of(model)
    with pytest.raises(PayloadError, match=r"missing .*0\.x2"):
        fedpara.merge(spec, parts.shared, {})
    with pytest.raises(PayloadError, match=r"not expected .*surplus"):
        fedpara.merge(spec, {**parts.shared, "surplus": torch.zeros(1)}, parts.private)
