"""``fedpara plan --input``: which times a predicted step is made of, and what a user reads."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import FedParaConfig
from fedpara_plugins.cli import step_cost
from fedpara_plugins.cli.step_cost import StepCost, parse_input
from fedpara_plugins.cli.step_parts import composition
from fedpara_plugins.errors import ConfigError

CONFIG = FedParaConfig(method="fedpara", rank=2, min_size=0)


@pytest.fixture
def times(monkeypatch):
    """Every piece takes one second, but for those that a test sets; holds what was asked for."""
    given, asked = {}, []

    def timed(pieces, seconds):
        for name, call in pieces.items():
            call()
            asked.append(name)
        return {name: given.get(name, 1.0) for name in pieces}

    monkeypatch.setattr(step_cost, "_timed", timed)
    given["asked"] = asked
    return given


def cost_of(model, *inputs, config=CONFIG):
    return step_cost.step_cost(model, config, inputs)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv(x))


def test_a_weight_is_composed_as_often_as_a_forward_does(times):
    times |= {"": 40.0, "conv.weight": 7.0, "conv.weight step": 3.0}
    cost = cost_of(Twice(), torch.randn(2, 8, 5, 5))
    assert cost.added == {"conv.weight": 2 * 7.0 + 1.0 - 3.0}
    assert cost.ratio == (40 + 12) / 40


def test_linear_layers_are_timed_with_factors_and_without(times):
    times |= {"": 10.0, "1.weight with factors": 9.0, "1.weight dense": 4.0}
    cost = cost_of(nn.Sequential(nn.Flatten(), nn.Linear(24, 32)), torch.randn(5, 4, 6))
    assert cost.added == {"1.weight": 5.0}
    assert "1.weight" not in times["asked"]


def test_weights_of_an_lstm_and_of_attention(times):
    model = nn.LSTM(8, 16, num_layers=2)
    assert set(cost_of(model, torch.randn(5, 3, 8)).added) == {
        f"weight_{kind}_l{i}" for kind in ("ih", "hh") for i in (0, 1)
    }
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    found = cost_of(layer, torch.randn(2, 5, 32))
    # Attention reads its output layer's weight, and never calls that layer.
    assert set(found.added) == {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }
    assert "self_attn.out_proj.weight" in times["asked"]


def test_tokens(times):
    model = nn.Sequential(nn.Embedding(300, 16), nn.Linear(16, 20))
    cost = cost_of(model, parse_input("3x7:300"))
    assert set(cost.added) == {"0.weight", "1.weight"}


def test_what_is_not_used_costs_nothing(times):
    class Net(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x))

    model = Net(*(nn.Conv1d(8, 8, 3) for _ in range(3)))
    assert set(cost_of(model, torch.randn(2, 8, 9)).added) == {"0.weight", "1.weight"}


@pytest.mark.parametrize("options", [{"method": "none"}, {"local": "dense"}])
def test_clients_that_train_no_factors(options, times):
    config = FedParaConfig(**{"method": "fedpara", "min_size": 0, **options})
    cost = cost_of(nn.Linear(24, 32), torch.randn(2, 24), config=config)
    assert (cost.added, cost.ratio) == ({}, 1)
    assert "no factors" in str(cost)


def test_the_model_and_the_random_numbers_stay_as_they_are():
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.Dropout()).eval()
    inputs = [torch.randn(2, 8, 9)]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    threads = torch.get_num_threads()
    step_cost.step_cost(model, CONFIG, inputs, seconds=0.0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.training
    assert model[0].weight.grad is None
    assert threads == torch.get_num_threads()
    assert torch.equal(torch.get_rng_state(), state)


def test_each_piece_runs_in_turns_and_the_median_counts(monkeypatch):
    """On a clock that moves only when a piece runs."""
    now, ran = [0.0], []

    def piece(name, seconds):
        def call():
            ran.append(name)
            now[0] += seconds * (100 if ran.count(name) == 4 else 1)

        return call

    monkeypatch.setattr(step_cost.time, "process_time", lambda: now[0])
    found = step_cost._timed({"a": piece("a", 1.0), "b": piece("b", 0.25)}, 0.0)
    assert found == {"a": 1.0, "b": 0.25}
    assert ran == ["a", "a", "b", "b"] + ["a", "b"] * step_cost.FEWEST


def test_outputs_of_any_form():
    class Net(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return {"loss": y.sum(), "rest": (y, [y.argmax(), None])}

    step_cost.step_cost(Net(nn.Linear(24, 32)), CONFIG, [torch.randn(2, 24)], seconds=0.0)


def test_what_a_user_reads(command, monkeypatch):
    cost = StepCost(0.5, {"body.0.weight": 0.2, "head.weight": 0.04, "stem.weight": -0.01})
    monkeypatch.setattr("fedpara_plugins.cli.command.step_cost", lambda *given: cost)
    code, out, err = command("plan", "user_models:Net", "--input", "2x3x8x8")
    assert (code, err) == (0, "")
    assert out.endswith(
        "\none training step on one core here: 500 ms dense, about 730 ms with factors: 1.46 "
        "times\nMost of what is added: body.0.weight 200 ms, head.weight 40 ms.\n"
    )


def test_the_users_own_model(command):
    code, out, err = command("plan", "user_models:Net", "--input", "2x3x8x8", "--gamma", "0.1")
    assert (code, err) == (0, "")
    assert "training step" in out
    assert "training step" not in command("plan", "user_models:Net")[1]


@pytest.mark.parametrize("text", ["", "3x", "axb", "0x3", "-1x3", "3x4:", "3x4:0", "3x4:b", "3,4"])
def test_no_shape(text, refused):
    assert "expected a shape" in refused("plan", "user_models:Net", f"--input={text}")


@pytest.mark.parametrize("words", [["--input", "2x5"], ["--input", "2x3x8x8"] * 2])
def test_inputs_that_the_model_does_not_take(words, refused):
    assert "fails on inputs of shape 2x" in refused("plan", "user_models:Net", *words)


def test_parsed_inputs():
    assert parse_input("2x3").dtype == torch.float32
    tokens = parse_input("50x20:7")
    assert (tokens.shape, tokens.dtype) == ((50, 20), torch.int64)
    assert set(tokens.unique().tolist()) == set(range(7))
    with pytest.raises(ConfigError):
        parse_input("2x3:1.5")


def test_timed_parts_are_those_of_the_real_layers():
    """What is timed as composing gives the gradients that a step of the layer gives."""
    layer = fedpara.convert(nn.Conv1d(8, 8, 3), CONFIG)
    gradients = composition(layer, "weight")()
    assert [g.shape for g in gradients] == [f.shape for f in layer.factors("weight").values()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_numbers_are_of_the_models_dtype(times, dtype):
    model = nn.Sequential(nn.Linear(24, 32)).to(dtype)
    assert cost_of(model, torch.randn(5, 24)).dense == 1.0


class Outputs(nn.Module):
    """A linear layer with its output in a form of its own."""

    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(24, 32), form

    def forward(self, x):
        return self.form(self.linear(x))


@dataclass
class Answer:
    logits: torch.Tensor
    text: str = "cat"


def test_outputs_in_a_dataclass(times):
    times |= {"": 10.0, "linear.weight with factors": 9.0, "linear.weight dense": 4.0}
    assert cost_of(Outputs(Answer), torch.randn(5, 24)).added == {"linear.weight": 5.0}


@pytest.mark.parametrize("form", [lambda y: None, lambda y: y.argmax(1), lambda y: y.detach()])
def test_outputs_without_a_gradient_are_refused(times, form):
    with pytest.raises(ConfigError, match="holds no tensor with a gradient"):
        cost_of(Outputs(form), torch.randn(5, 24))
