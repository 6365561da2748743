"""The target variance as an option, and starting again from the config's own seed."""

import copy

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import FedParaConfig, ModelSpec

METHODS = ("lowrank", "fedpara", "pfedpara")

LAYERS = {
    "linear": (lambda: nn.Linear(120, 96), "weight", 120),
    "conv1d": (lambda: nn.Conv1d(64, 48, 3), "weight", 64 * 3),
    "conv2d": (lambda: nn.Conv2d(48, 64, 3, groups=2), "weight", 24 * 9),
    "conv3d": (lambda: nn.Conv3d(24, 32, 3), "weight", 24 * 27),
    "1x1": (lambda: nn.Conv2d(96, 128, 1), "weight", 96),
    "transpose": (lambda: nn.ConvTranspose2d(48, 64, 3), "weight", 64 * 9),
    "embedding": (lambda: nn.Embedding(500, 64), "weight", 1),
    "lstm": (lambda: nn.LSTM(96, 64), "weight_ih_l0", 96),
    "gru": (lambda: nn.GRU(96, 64), "weight_hh_l0", 64),
    "attention": (lambda: nn.MultiheadAttention(64, 4), "in_proj_weight", 64),
}


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_has_the_variance_that_was_asked_for(kind, method, tanh):
    build, name, fan_in = LAYERS[kind]
    torch.manual_seed(0)
    for variance, expected in (("he", 2 / fan_in), (0.0004, 0.0004), ("default", None)):
        dense = build()
        spread = getattr(dense, name).double().var().item()
        layer = fedpara.convert(dense, method=method, rank=8, variance=variance, tanh=tanh)
        got = layer.composed_weight(name).double().var().item()
        rel = 0.05 if expected else 0.15  # the dense draw has its own error
        assert got == pytest.approx(expected or spread, rel=rel)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [lambda: nn.Linear(120, 96), lambda: nn.Conv2d(48, 64, 3)])
def test_the_speed_is_as_stated_at_every_variance(build, method, tanh):
    """Along a random gradient G: <W(step) - W, -G> / (rate |G|²) over the shared factors is K."""
    torch.manual_seed(0)
    for variance in ("he", 0.0004):
        slopes = []
        for _ in range(8):
            layer = fedpara.convert(
                build(), method=method, gamma=0.3, speed=0.4, variance=variance, tanh=tanh,
                private_speed=0.001,
            )  # fmt: skip
            gradient = torch.randn(layer.weight.shape)
            before = layer.weight.detach()
            (layer.weight * gradient).sum().backward()
            with torch.no_grad():
                for factor in layer.factors("weight").values():
                    factor -= 1e-5 * factor.grad
            moved = (layer.weight.detach() - before) / 1e-5
            slopes.append(float(-(moved * gradient).sum() / gradient.square().sum()))
        assert sum(slopes) / 8 == pytest.approx(0.4, rel=0.1)


def test_layers_of_their_own_variance():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    model = fedpara.convert(model, variance="0.0004", overrides="1: variance=HE")
    assert model[0].plans["weight"].variance == 0.0004
    assert model[1].plans["weight"].variance == 0.02


def test_text_and_numbers_are_the_same_option():
    for given, kept in (("He", "he"), (" 4e-4", 0.0004), (0.0004, 0.0004), (1, 1.0)):
        config = FedParaConfig.from_mapping({"fp.variance": given}, prefix="fp.")
        assert config.variance == kept
        assert FedParaConfig.from_mapping(config.to_mapping()) == config
    assert FedParaConfig.from_mapping({"variance": ""}).variance == "auto"


def reset(module):
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    elif hasattr(module, "_reset_parameters"):
        module._reset_parameters()


@pytest.mark.parametrize("seed", [0, 7])
def test_a_reset_gives_the_private_factors_that_every_client_starts_from(seed):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {name: build() for name, (build, *_) in LAYERS.items() if name != "attention"}
    )
    fedpara.convert(model, method="pfedpara", gamma=0.5, seed=seed)
    spec = ModelSpec.of(model)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    model.apply(reset)
    after = model.state_dict()
    private = spec.initial_private()
    assert private
    for name, value in private.items():
        assert torch.equal(after[name], value)
    for name in set(after) - set(private):
        assert not torch.equal(after[name], before[name])
        assert after[name].abs().max() != 3.0
        size, first = after[name].square().mean(), before[name].square().mean()
        assert 0.25 < size / first < 4  # drawn by the same rule, biases too


def test_a_reset_of_half_precision_keeps_dtype_and_objects():
    layer = fedpara.convert(nn.Linear(100, 80), method="fedpara").bfloat16()
    objects = [id(p) for p in layer.parameters()]
    layer.reset_parameters()
    assert [id(p) for p in layer.parameters()] == objects
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
