"""The description of a model that two sides agree on."""

import json

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import MismatchError, ModelSpec, PayloadError
from fedpara_plugins.models.private import PrivateTensor


def net():
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 32))


def converted(**options):
    return fedpara.convert(net(), **{"method": "pfedpara", "gamma": 0.5, **options})


def test_spec_travels_as_json():
    model = converted()
    spec = ModelSpec.of(model)
    text = json.dumps(spec.to_json())
    again = ModelSpec.from_json(json.loads(text), spec.shared_keys)
    assert again.keys == spec.keys
    assert again.private_keys == spec.private_keys
    assert again.fingerprint == spec.fingerprint
    first, expected = again.initial_private(), spec.initial_private()
    assert all(torch.equal(first[k], expected[k]) for k in expected)


def test_first_private_factors_are_those_of_the_model():
    for model in (converted(), fedpara.convert(nn.Linear(64, 96), method="pfedpara", gamma=0.5)):
        first = ModelSpec.of(model).initial_private()
        private = fedpara.split(model).private
        assert first.keys() == private.keys()
        assert all(torch.equal(first[key], private[key]) for key in first)


def test_fingerprint_depends_on_what_matters_only():
    spec = ModelSpec.of(converted())
    assert ModelSpec.of(converted()).fingerprint == spec.fingerprint
    for options in ({"gamma": 0.4}, {"seed": 1}, {"speed": 0.5}, {"method": "fedpara"}):
        assert ModelSpec.of(converted(**options)).fingerprint != spec.fingerprint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 0.2}, ["0.weight", "rank 14", "rank 11", "client", "server"]),
        ({"exclude": ["2"]}, ["2.weight", "dense"]),
        ({"seed": 5}, ["seed 0", "seed 5"]),
    ],
)
def test_mismatch_names_both_sides(options, words):
    mine, theirs = ModelSpec.of(converted()), ModelSpec.of(converted(**options))
    with pytest.raises(MismatchError) as caught:
        mine.check_equal(theirs, here="the client", there="the server")
    for word in words:
        assert word in str(caught.value)
    mine.check_equal(ModelSpec.of(converted()), here="the client", there="the server")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("weights"),
        lambda data: data["weights"].clear(),
        lambda data: data["weights"][0].__setitem__(3, 99),
        lambda data: data["weights"][0].__setitem__(1, "unheard-of"),
        lambda data: data.__setitem__("private", [["x"]]),
        lambda data: data["private"].append(data["private"][0]),
        lambda data: data["private"][0].__setitem__(0, -1),
        lambda data: data["private"][0].__setitem__(0, 10**6),
        lambda data: data["weights"][0].__setitem__(2, []),
        lambda data: data["weights"][0].__setitem__(2, [16, -12]),
        lambda data: data["weights"][0][4].__setitem__(0, float("nan")),
        lambda data: data.__setitem__("seed", None),
    ],
)
def test_damaged_descriptions_are_refused(damage):
    spec = ModelSpec.of(converted())
    data = spec.to_json()
    damage(data)
    with pytest.raises(PayloadError):
        ModelSpec.from_json(data, spec.shared_keys)


def test_private_tensors_of_any_size_are_refused_where_there_is_a_limit():
    """This side makes them itself, so the size of the message says nothing of them."""
    described = converted(private=["2.bias"])
    spec = ModelSpec.of(described)
    size = sum(4 * value.numel() for value in fedpara.split(described).private.values())
    assert spec.private_bytes == size
    data = spec.to_json()
    assert ModelSpec.from_json(data, spec.shared_keys, limit=size) == spec
    with pytest.raises(PayloadError, match=f"would take {size} bytes"):
        ModelSpec.from_json(data, spec.shared_keys, limit=size - 1)


def test_a_narrow_private_tensor_counts_what_its_draw_takes():
    """Values are drawn as float32, whatever they become."""
    own = {"h": PrivateTensor((100, 100), "float16", std=0.5)}
    spec = ModelSpec(weights={}, keys=("h",), seed=0, own=own)
    data = spec.to_json()
    assert ModelSpec.from_json(data, (), limit=60_000) == spec
    with pytest.raises(PayloadError, match="would take 60000 bytes"):
        ModelSpec.from_json(data, (), limit=59_999)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", "uint8", "bool"])
def test_constant_private_tensors_are_made_in_their_own_memory(dtype):
    found = PrivateTensor((3, 0, 2), dtype, fill=1.0).initial_value(seed=0, key="k")
    assert found.shape == (3, 0, 2)
    found = PrivateTensor((3, 4), dtype, fill=1.0).initial_value(seed=0, key="k")
    assert found.dtype == getattr(torch, dtype)
    assert found.is_contiguous()
    found[0, 0] = 0
    assert float(found.double().sum()) == 11


def test_dense_state_from_shared_keys_alone_is_w1():
    model = converted()
    with torch.no_grad():
        model[0].x2.normal_()
    spec = ModelSpec.of(model)
    dense = spec.dense_state(fedpara.split(model).shared)
    plan = model[0].plans["weight"]
    expected = plan.scale * torch.einsum("or,ir->oi", model[0].x1, model[0].y1)
    torch.testing.assert_close(dense["0.weight"], expected.detach())
    net().load_state_dict(dense, strict=True)


def test_dense_state_does_not_depend_on_autocast():
    model = converted()
    spec = ModelSpec.of(model)
    expected = spec.dense_state(model.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = spec.dense_state(model.state_dict())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_dense_bytes_count_the_dense_model():
    model = converted()
    spec = ModelSpec.of(model)
    expected = sum(v.numel() * v.element_size() for v in net().state_dict().values())
    assert spec.dense_bytes(model.state_dict()) == expected
    assert spec.dense_bytes(fedpara.split(model).shared) == expected
