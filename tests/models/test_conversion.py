"""Whole models: what is replaced, what is left alone and why, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError, ConversionError
from fedpara_plugins.layers import FactorisedConv2d, FactorisedLinear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3)
        self.norm = nn.BatchNorm2d(64)
        self.body = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64 * 16, 20)

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x))))


def reasons(model):
    return {row.name: row.note for row in fedpara.report(model).rows}


def test_none_is_the_identity():
    model = Net()
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    assert fedpara.convert(model, method="none") is model
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters


def test_replaces_in_place_and_leaves_the_rest_alone():
    model = Net()
    norm, bias = model.norm, model.head.bias
    assert fedpara.convert(model, method="fedpara", gamma=0.1) is model
    assert type(model.stem) is nn.Conv2d
    assert type(model.body[0]) is FactorisedConv2d
    assert type(model.head) is FactorisedLinear
    assert model.norm is norm
    assert model.head.bias is bias
    assert list(model.state_dict()) == [
        "stem.weight", "stem.bias",
        "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked",
        "body.0.x1", "body.0.y1", "body.0.t1", "body.0.x2", "body.0.y2", "body.0.t2",
        "head.x1", "head.y1", "head.x2", "head.y2", "head.bias",
    ]  # fmt: skip


def test_a_single_layer_is_a_model_too():
    layer = fedpara.convert(nn.Linear(100, 80), method="fedpara")
    assert type(layer) is FactorisedLinear
    assert type(fedpara.to_dense(layer)) is nn.Linear


def test_rank_ratio_and_patterns():
    assert fedpara.convert(Net(), rank=5).head.plans["weight"].rank == 5
    model = fedpara.convert(Net(), ratio=0.5, exclude=["head"])
    assert type(model.head) is nn.Linear
    assert "patterns" in reasons(model)["head"]
    kernel = sum(f.numel() for f in model.body[0].parameters())
    assert kernel / (64 * 64 * 9) == pytest.approx(0.5, rel=0.05)
    assert type(fedpara.convert(Net(), include=["body.*"]).head) is nn.Linear


def test_overrides_for_single_layers():
    overrides = {"body.*": {"rank": 5}, "head": {"method": "lowrank", "gamma": 0.0}}
    model = fedpara.convert(Net(), method="fedpara", gamma=0.3, overrides=overrides)
    assert model.body[0].plans["weight"].rank == 5
    assert model.head.plans["weight"].method.name == "lowrank"
    model = fedpara.convert(Net(), overrides={"head": {"method": "none"}})
    assert type(model.head) is nn.Linear
    assert "method none" in reasons(model)["head"]


def test_generic_full_rank_at_the_smallest_rank():
    layer = fedpara.convert(nn.Linear(100, 100), gamma=0.0)
    assert layer.plans["weight"].rank == 10
    assert torch.linalg.matrix_rank(layer.weight.double()) == 100


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.Linear(128, 99))
    model[2].weight = model[0].weight
    fedpara.convert(model, method="fedpara")
    assert model[2].weight is model[0].weight
    assert "tied to 2" in reasons(model)["0"]


def test_copies_of_fitted_models_have_the_same_report():
    model = fedpara.convert(Net(), method="fedpara", init="fit")
    assert fedpara.report(copy.deepcopy(model)) == fedpara.report(model)


@pytest.mark.parametrize("init", ["auto", "random"])
def test_private_factors_are_seeded_and_shared_ones_by_default(init):
    """With ``init="random"`` shared ones follow torch's generator."""

    def state(torch_seed, seed):
        torch.manual_seed(torch_seed)
        options = {"method": "pfedpara", "gamma": 0.5, "seed": seed, "init": init}
        return fedpara.split(fedpara.convert(Net(), **options))

    one, other_torch, other_seed = state(0, 0), state(1, 0), state(0, 1)
    for name, value in one.private.items():
        assert torch.equal(value, other_torch.private[name])
    same = torch.equal(one.shared["head.x1"], other_torch.shared["head.x1"])
    assert same == (init == "auto")
    assert not torch.equal(one.private["head.y2"], other_seed.private["head.y2"])
    assert not torch.equal(one.private["head.y2"][:10], one.private["body.0.y2"][:10, :1])


def lazy():
    return nn.Sequential(nn.Linear(100, 100), nn.LazyLinear(10))


def parametrised():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.head)
    return model


def shared_module():
    layer = nn.Linear(100, 100)
    return nn.Sequential(layer, nn.ReLU(), layer)


def with_nan():
    model = Net()
    model.head.weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lazy, ["'1'", "lazy", "forward pass"]),
        (parametrised, ["'head'", "parametris", "remove"]),
        (shared_module, ["'0'", "'2'", "one and the same"]),
        (with_nan, ["'head'", "NaN", "weight"]),
        (nn.Identity, ["no parameters"]),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), ["0.weight", "min_size", "1"]),
        (lambda: fedpara.convert(Net()), ["already factorised", "to_dense"]),
    ],
)
def test_models_that_cannot_be_converted(build, words):
    with pytest.raises(ConversionError) as caught:
        fedpara.convert(build(), method="fedpara")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "fedpera"}, ["fedpera", "fedpara", "pfedpara", "none"]),
        ({"overrides": {"nose": {"rank": 3}}}, ["overrides", "nose", "stem"]),
        ({"exclude": ["nose"]}, ["nose", "stem", "head"]),
        ({"gamma": 7}, ["gamma", "7"]),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError) as caught:
        fedpara.convert(Net(), **options)
    for word in words:
        assert word in str(caught.value)
