"""State that the user keeps on the device by name, whatever the method."""

import json

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError, MismatchError, ModelSpec

METHODS = ("none", "lowrank", "fedpara", "pfedpara")
PATTERNS = ("head.*", "*norm*")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 128)
        self.norm = nn.BatchNorm1d(128)
        self.table = nn.Parameter(torch.randn(7, 128))
        self.head = nn.Linear(128, 64)


KEPT = [
    "norm.weight",
    "norm.bias",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
    "head.weight",
    "head.bias",
]


def converted(method, **options):
    return fedpara.convert(Net(), method=method, private=PATTERNS, **options)


@pytest.mark.parametrize("method", METHODS)
def test_named_state_is_private_and_the_whole_comes_back_in_order(method):
    model = converted(method)
    parts = fedpara.split(model)
    assert [name for name in parts.private if name in KEPT] == KEPT
    assert not set(parts.shared) & set(KEPT)
    whole = fedpara.merge(ModelSpec.of(model), parts.shared, parts.private)
    assert list(whole) == list(model.state_dict())
    converted(method).load_state_dict(whole, strict=True)


@pytest.mark.parametrize("method", METHODS)
def test_private_layers_are_not_factorised(method):
    model = converted(method)
    assert type(model.head) is nn.Linear
    assert (type(model.body) is nn.Linear) == (method == "none")
    if method != "none":
        assert "never travels" in str(fedpara.report(model))


def test_report_counts_private_names_as_not_sent():
    sent = sum(
        v.numel() * v.element_size() for v in fedpara.split(converted("none")).shared.values()
    )
    assert fedpara.report(converted("none")).shared_bytes == sent == (64 * 128 + 128 + 7 * 128) * 4


def told(spec):
    """The spec as a receiver without the model reads it."""
    return ModelSpec.from_json(json.loads(json.dumps(spec.to_json())), spec.shared_keys)


def test_without_the_model_first_values_are_those_of_fresh_layers_and_the_same_everywhere():
    torch.manual_seed(1)
    spec = told(ModelSpec.of(converted("pfedpara", seed=3)))
    torch.manual_seed(2)
    first = spec.initial_private()
    again = told(ModelSpec.of(converted("pfedpara", seed=3))).initial_private()
    assert first.keys() == spec.private_keys
    assert all(torch.equal(first[name], again[name]) for name in first)
    fresh = nn.BatchNorm1d(128).state_dict()
    for name, value in fresh.items():
        torch.testing.assert_close(first[f"norm.{name}"], value, rtol=0, atol=0)
    assert first["head.weight"].std().item() == pytest.approx((1 / (3 * 128)) ** 0.5, rel=0.05)
    other = told(ModelSpec.of(converted("pfedpara", seed=4))).initial_private()
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_spec_with_private_names_travels_as_json():
    spec = ModelSpec.of(converted("pfedpara"))
    again = told(spec)
    assert again.keys == spec.keys
    assert again.private_keys == spec.private_keys
    assert again.fingerprint == spec.fingerprint
    first, values = spec.initial_private(), again.initial_private()
    assert first.keys() == values.keys()
    for name, value in values.items():
        assert (value.shape, value.dtype) == (first[name].shape, first[name].dtype)
        if name in spec.private_factors:
            assert torch.equal(value, first[name])


@pytest.mark.parametrize("method", METHODS)
def test_dense_state_takes_own_values_and_falls_back_to_the_first(method):
    model = converted(method)
    parts, spec = fedpara.split(model), ModelSpec.of(model)
    Net().load_state_dict(spec.dense_state(parts.shared), strict=True)
    dense = spec.dense_state({**parts.shared, **parts.private})
    assert torch.equal(dense["head.weight"], model.head.weight)
    first = spec.initial_private()["head.weight"]
    assert torch.equal(spec.dense_state(parts.shared)["head.weight"], first)


def test_two_sides_that_keep_different_names_disagree():
    one = ModelSpec.of(fedpara.convert(Net(), method="none", private=("head.*",)))
    two = ModelSpec.of(fedpara.convert(Net(), method="none", private=("norm.*",)))
    with pytest.raises(
        MismatchError, match=r"client keeps .*head\.bias.*server keeps .*norm\.bias"
    ):
        one.check_equal(two, here="client", there="server")


@pytest.mark.parametrize("method", ["none", "fedpara"])
def test_patterns_that_cannot_be_meant_are_refused(method):
    with pytest.raises(ConfigError, match=r"'haed\.\*' matches no name.*head\.weight"):
        fedpara.convert(Net(), method=method, private=["haed.*"])
    with pytest.raises(ConfigError, match="nothing is left to send"):
        fedpara.convert(Net(), method=method, private=("*",))


@pytest.mark.parametrize("method", ["none", "fedpara", "pfedpara"])
@pytest.mark.parametrize("part", [slice(None), slice(0, 3), slice(-1, None)])
def test_a_private_tensor_that_shares_memory_with_another_is_refused(method, part):
    """Another parameter or buffer over the same values would travel under its own name."""
    model = Net()
    model.register_buffer("seen", model.head.weight.detach()[part])
    with pytest.raises(ConfigError, match=r"'head\.weight' is the same tensor as 'seen'"):
        fedpara.convert(model, method=method, private=("head.*",))
    assert fedpara.convert(model, method=method, private=("head.*", "seen"))


def test_private_tensors_beside_others_in_one_block_of_memory():
    """As in flattened models: the same storage, and no value in common."""
    model = Net()
    block = torch.zeros(2 * model.head.weight.numel())
    halves = block.view(2, *model.head.weight.shape)
    model.head.weight = nn.Parameter(halves[0])
    model.register_buffer("seen", halves[1])
    assert fedpara.convert(model, method="none", private=("head.*",))


def test_a_tensor_tied_to_a_shared_one_cannot_be_private():
    model = Net()
    model.decoder = nn.Linear(64, 128)
    model.decoder.weight = model.body.weight
    with pytest.raises(
        ConfigError, match=r"'decoder\.weight' is the same tensor as 'body\.weight'"
    ):
        fedpara.convert(model, method="none", private=("decoder.*",))


def test_patterns_come_as_text_with_commas():
    config = fedpara.FedParaConfig.from_mapping({"private": "head.*, *norm*"})
    assert config.private == PATTERNS
