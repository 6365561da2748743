"""Private tensors that are no factors start as the client's own model holds them."""

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ModelSpec
from fedpara_plugins.models import keep_own_values

METHODS = ("none", "lowrank", "fedpara", "pfedpara")
PATTERNS = ("*norm*", "head.*", "positions", "scale")


class Gamma(nn.Module):
    """A norm whose weight has another name than torch's."""

    def __init__(self, size):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((size,), 1.5))

    def forward(self, x):
        return x * self.gamma


class Net(nn.Module):
    """Every kind of private tensor whose first value its name does not tell."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 128)
        self.norm = nn.BatchNorm1d(128)
        self.norm2 = Gamma(128)
        angles = torch.arange(9)[:, None] * torch.exp(-torch.arange(128) / 16)
        self.register_buffer("positions", torch.sin(angles))
        self.register_buffer("scale", torch.tensor(math.sqrt(128)))
        self.head = nn.Linear(128, 10)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, -4.6)
        self.norm.running_mean.fill_(0.3)
        self.norm.running_var.fill_(2.5)
        self.norm.num_batches_tracked.fill_(77)


def model_of(method):
    torch.manual_seed(0)
    return fedpara.convert(Net(), method=method, gamma=0.3, private=PATTERNS)


def names_of(model):
    factors = ModelSpec.of(model).private_factors
    return [name for name in fedpara.split(model).private if name not in factors]


@pytest.mark.parametrize("method", METHODS)
def test_a_client_starts_from_what_its_model_holds(method):
    model = model_of(method)
    expected = {name: model.state_dict()[name].clone() for name in names_of(model)}
    assert {"norm2.gamma", "norm.running_var", "positions", "scale", "head.bias"} <= set(expected)
    first = ModelSpec.of(model).initial_private()
    for name, value in expected.items():
        assert torch.equal(first[name], value)
        assert first[name].dtype == value.dtype


def test_private_factors_keep_their_seeded_start():
    one, other = model_of("pfedpara"), model_of("pfedpara")
    spec = ModelSpec.of(one)
    told = ModelSpec.from_json(json.loads(json.dumps(spec.to_json())), spec.shared_keys)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    names = spec.private_factors
    assert names
    for first in (spec, told, ModelSpec.of(other)):
        values = first.initial_private()
        assert all(torch.equal(values[n], one.state_dict()[n]) for n in names)


def test_training_does_not_change_what_was_held_at_the_start():
    model = model_of("fedpara")
    spec = ModelSpec.of(model)
    before = copy.deepcopy(spec.initial_private())
    with torch.no_grad():
        model.norm2.gamma.fill_(9.0)
        spec.initial_private()["norm2.gamma"].fill_(8.0)
    for name, value in spec.initial_private().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("method", METHODS)
def test_the_server_s_dense_model_has_its_own_private_values(method):
    model = model_of(method)
    spec = ModelSpec.of(model)
    dense = spec.dense_state(fedpara.split(model).shared)
    for name in names_of(model):
        assert torch.equal(dense[name], model.state_dict()[name])


def test_what_is_held_is_no_part_of_the_description():
    one, other = model_of("fedpara"), model_of("fedpara")
    other.norm2.gamma.data.fill_(3.0)
    assert ModelSpec.of(one).to_json() == ModelSpec.of(other).to_json()
    ModelSpec.of(one).check_equal(ModelSpec.of(other), here="one", there="other")
    assert "1.5" not in json.dumps(ModelSpec.of(one).to_json())


# Where the model is built after the message was decoded


def message_for(model):
    """A state as a client without private state gets it, and the values that stand in."""
    spec = ModelSpec.of(model)
    told = ModelSpec.from_json(json.loads(json.dumps(spec.to_json())), spec.shared_keys)
    shared = {k: torch.full_like(v, 0.25) for k, v in fedpara.split(model).shared.items()}
    first = told.initial_private(shared)
    return fedpara.merge(told, shared, first), first


@pytest.mark.parametrize("method", METHODS)
def test_a_model_keeps_its_own_values_when_it_loads_those_that_stand_in(method):
    model = model_of(method)
    state, first = message_for(model)
    own = {name: first[name] for name in names_of(model)}
    assert not torch.equal(own["norm2.gamma"], model.norm2.gamma)  # the fault of before
    expected = copy.deepcopy(model.state_dict())
    keep_own_values(model, own)
    for _ in range(2):
        model.load_state_dict(state, strict=True)
        for name, value in model.state_dict().items():
            wanted = expected[name] if name in own else state[name]
            assert torch.equal(value, wanted)
    assert torch.equal(state["norm2.gamma"], first["norm2.gamma"])  # the user's dict stays


def test_other_values_are_loaded_as_they_are():
    model = model_of("fedpara")
    state, first = message_for(model)
    keep_own_values(model, {name: first[name] for name in names_of(model)})
    state["norm2.gamma"] = torch.full((128,), 7.0)
    model.load_state_dict(state)
    assert bool((model.norm2.gamma == 7.0).all())
    assert torch.equal(model.head.bias, torch.full((10,), -4.6))


def test_a_model_with_such_a_hook_is_copied_and_pickled():
    model = model_of("fedpara")
    state, first = message_for(model)
    keep_own_values(model, {name: first[name] for name in names_of(model)})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.load_state_dict(state)
        assert torch.equal(twin.norm2.gamma, torch.full((128,), 1.5))


def test_a_wrapped_model_keeps_its_own_values_too():
    model = model_of("fedpara")
    state, first = message_for(model)
    keep_own_values(model, {name: first[name] for name in names_of(model)})
    wrapped = nn.DataParallel(model)
    wrapped.load_state_dict({f"module.{name}": value for name, value in state.items()})
    assert torch.equal(model.norm2.gamma, torch.full((128,), 1.5))
    assert torch.equal(model.state_dict()["body.bias" if "body.bias" in state else "body.x1"],
                       state["body.bias" if "body.bias" in state else "body.x1"])  # fmt: skip
