"""Weights that start from values of their own keep them, as far as fresh factors can."""

import copy
import json
import logging

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import MismatchError, ModelSpec
from fedpara_plugins.factors.initialise import seeded_shared
from fedpara_plugins.factors.speed import reached_speed
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.models import adopt_plans, load_factors, save_factors
from fedpara_plugins.testing.brute_force import reference_weight

METHODS = ("lowrank", "fedpara", "pfedpara")
STARTS = {
    "gpt": (lambda: nn.Embedding(400, 48), lambda w: nn.init.normal_(w, std=0.02)),
    "head": (lambda: nn.Linear(64, 50), lambda w: nn.init.normal_(w, std=0.001)),
    "he": (lambda: nn.Conv2d(24, 32, 3), nn.init.kaiming_normal_),
    "large": (lambda: nn.Linear(64, 50), lambda w: nn.init.normal_(w, std=2.0)),
    "zero": (lambda: nn.Linear(64, 50), nn.init.zeros_),
    "zero kernel": (lambda: nn.Conv2d(24, 32, 3), nn.init.zeros_),
}


def model_of(start, seed=0):
    torch.manual_seed(seed)
    build, rule = STARTS[start]
    layer = build()
    rule(layer.weight)
    return nn.Sequential(layer, nn.Linear(64, 64))


def size(weight):
    return float(weight.detach().double().square().mean().sqrt())


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("init", ["random", "seeded"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", STARTS)
def test_a_start_of_its_own_keeps_its_size(start, method, init, tanh):
    dense = model_of(start)
    expected = size(dense[0].weight)
    layer = fedpara.convert(dense, method=method, gamma=0.2, init=init, tanh=tanh)[0]
    factors = {n: f.detach() for n, f in layer.factors("weight").items()}
    rel = 0.02 if init == "seeded" else 1e-3  # seeded factors are rounded to a grid
    found = size(reference_weight(layer, "weight", factors))
    assert found == pytest.approx(expected, rel=0.1 if expected > 1 and tanh else rel)
    assert layer.own_starts["weight"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", ["gpt", "he", "large", "zero"])
def test_and_the_speed_that_the_option_says(start, method):
    shapes = {"gpt": nn.Embedding(60, 20), "he": nn.Conv2d(12, 10, 3)}
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        layer = copy.deepcopy(shapes.get(start, nn.Linear(24, 20)))
        STARTS[start][1](layer.weight)
        options = {"gamma": 0.3, "min_size": 0, "speed": 0.4, "init": "random"}
        layer = fedpara.convert(layer, method=method, **options).double()
        found.append(reached_speed(layer.plans["weight"], layer.factors("weight")))
    assert sum(found) / 6 == pytest.approx(0.4, rel=0.2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [STARTS["zero"][0], STARTS["zero kernel"][0]])
def test_a_zero_weight_starts_at_zero_and_trains(build, method):
    layer = build()
    nn.init.zeros_(layer.weight)
    layer = fedpara.convert(layer, method=method, gamma=0.2, init="random")
    assert not layer.composed_weight("weight").any()
    target = torch.randn(layer.plans["weight"].shape) * 0.02
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (layer.composed_weight("weight") - target).square().sum() / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    "rule", [None, nn.init.xavier_uniform_, lambda w: nn.init.normal_(w, std=0.08)]
)
def test_a_start_near_the_default_is_the_default(rule):
    torch.manual_seed(0)
    layer = nn.Linear(64, 200)
    if rule is not None:
        rule(layer.weight)
    layer = fedpara.convert(layer, gamma=0.2, variance="torch")
    assert layer.own_starts == {}
    assert size(layer.weight) == pytest.approx((1 / 192) ** 0.5, rel=0.01)


@pytest.mark.parametrize("variance", ["he", 0.01])
@pytest.mark.parametrize("start", ["head", "zero", "large"])
def test_the_option_variance_comes_first(start, variance):
    layer = fedpara.convert(model_of(start), variance=variance, gamma=0.2)[0]
    expected = {"he": 2 / 64}.get(variance, variance)
    assert size(layer.weight) == pytest.approx(expected**0.5, rel=0.01)
    assert layer.own_starts == {}


def test_the_log_once_and_the_report_say_so(caplog, monkeypatch):
    monkeypatch.setattr("fedpara_plugins.models.conversion._told", set())
    with caplog.at_level(logging.INFO, logger="fedpara"):
        for seed in (0, 1, 0):  # a client builds its model anew in each round
            model = fedpara.convert(model_of("gpt", seed), gamma=0.2)
    (text,) = [r.getMessage() for r in caplog.records if "start of their own" in r.getMessage()]
    assert "'0.weight' 0.0199" in text
    assert "variance" in text
    notes = {row.name: row.note for row in fedpara.report(model).rows}
    assert "keeps its own standard deviation 0.0199" in notes["0.weight"]
    assert "standard deviation" not in notes["1.weight"]


def test_a_reset_gives_the_same_start_again():
    layer = fedpara.convert(model_of("gpt"), gamma=0.2)[0]
    before = layer.x1.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.x1, before)
    assert size(layer.weight) == pytest.approx(0.02, rel=0.02)


# Two sides


@pytest.mark.parametrize("start", STARTS)
def test_two_sides_that_draw_by_one_recipe_agree(start):
    specs = [
        ModelSpec.of(fedpara.convert(model_of(start, seed), method="fedpara", gamma=0.2))
        for seed in range(5)
    ]
    for spec in specs:
        spec.check_equal(specs[0], here="a client", there="the server")


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_the_seeded_start_follows_from_the_description_alone(start, tanh):
    """So it need not be sent, although it is the model's own."""
    model = fedpara.convert(model_of(start), method="fedpara", gamma=0.2, init="seeded", tanh=tanh)
    spec = ModelSpec.of(model)
    told = ModelSpec.from_json(json.loads(json.dumps(spec.to_json())), spec.shared_keys)
    for weight, plan in told.weights.items():
        for name, value in seeded_shared(plan, seed=told.seed, key=weight).items():
            assert torch.equal(value, model.state_dict()[told.factor_keys(weight)[name]])


@pytest.mark.parametrize("start", [-0.1, 1.5, float("nan"), float("inf"), "x", None, []])
def test_a_description_with_a_start_that_cannot_be_is_refused(start):
    spec = ModelSpec.of(fedpara.convert(model_of("gpt"), gamma=0.2))
    data = json.loads(json.dumps(spec.to_json()))
    data["weights"][0][6] = start
    with pytest.raises(fedpara.PayloadError, match="malformed"):
        ModelSpec.from_json(data, spec.shared_keys)


def test_a_description_without_starts_is_that_of_the_earlier_release():
    model = fedpara.convert(nn.Sequential(nn.Linear(64, 64)), gamma=0.2)
    assert [len(row) for row in ModelSpec.of(model).to_json()["weights"]] == [6]


@pytest.mark.parametrize("method", METHODS)
def test_a_side_takes_over_the_plans_that_the_other_s_weights_made(method):
    def side(std, **options):
        torch.manual_seed(0)
        layer = nn.Linear(64, 50)
        nn.init.normal_(layer.weight, std=std)
        return fedpara.convert(nn.Sequential(layer), method=method, gamma=0.3, **options)

    server = ModelSpec.of(side(1.3, init="fit"))
    client = side(0.07, init="random")
    weight = client[0].weight.detach().clone()
    with pytest.raises(MismatchError):
        ModelSpec.of(client).check_equal(server, here="client", there="server")
    adopt_plans(client, server)
    ModelSpec.of(client).check_equal(server, here="client", there="server")
    assert ModelSpec.of(client).to_json() == server.to_json()
    torch.testing.assert_close(client[0].weight, weight)
    for options in ({"speed": 0.9}, {"rank": 5}, {"tanh": True}):
        other = side(0.07, init="random", **options)
        plans = copy.deepcopy(other[0].plans)
        adopt_plans(other, server)
        assert other[0].plans == plans
        with pytest.raises(MismatchError):
            ModelSpec.of(other).check_equal(server, here="client", there="server")


def test_a_checkpoint_of_fitted_factors_loads_into_a_model_with_fresh_ones(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(64, 50)
    nn.init.normal_(layer.weight, std=1.3)
    fitted = fedpara.convert(nn.Sequential(layer), method="fedpara", gamma=0.3, init="fit")
    save_factors(fitted, tmp_path / "f.safetensors")
    fresh = fedpara.convert(nn.Sequential(nn.Linear(64, 50)), method="fedpara", gamma=0.3)
    load_factors(fresh, tmp_path / "f.safetensors")
    torch.testing.assert_close(fresh[0].weight, fitted[0].weight)


# Adapters


class Tuner(nn.Module):
    """What PEFT puts in place of a linear layer, by its names."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(64, 64)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(64, 32, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(32, 64, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)


def test_adapters_stay_dense_with_that_reason():
    model = fedpara.convert(nn.Sequential(Tuner(), nn.Linear(64, 64)), gamma=0.2)
    notes = {row.name: row.note for row in fedpara.report(model).rows}
    for name in ("lora_A", "lora_B"):
        assert type(model[0].get_submodule(f"{name}.default")) is nn.Linear
        assert f"a part of an adapter ({name})" in notes[f"0.{name}.default"]
    assert isinstance(model[0].base_layer, FactorisedLayer)
    assert isinstance(model[1], FactorisedLayer)


def test_adapters_that_include_names_are_factorised():
    model = fedpara.convert(nn.Sequential(Tuner()), gamma=0.2, include=["0.lora_B*"])
    assert isinstance(model[0].lora_B["default"], FactorisedLayer)
    assert not isinstance(model[0].lora_A["default"], FactorisedLayer)


def test_layers_of_peft_itself_stay_dense():
    kind = type("VeraLayer", (nn.Linear,), {"__module__": "peft.tuners.vera.layer"})
    model = fedpara.convert(nn.Sequential(kind(64, 64), nn.Linear(64, 64)), gamma=0.2)
    notes = {row.name: row.note for row in fedpara.report(model).rows}
    assert "a part of an adapter (VeraLayer)" in notes["0"]
