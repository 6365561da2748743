"""What hangs on the dense layers themselves: it follows, or it is refused or said."""

import copy
import socket

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedpara_plugins as fedpara
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.models import adopt_plans

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def notes(model):
    return {row.name: row.note for row in fedpara.report(model).rows}


def by_hand(model, x):
    hidden = F.relu(F.linear(x, model[0].weight, model[0].bias))
    return F.linear(hidden, model[2].weight, model[2].bias)


def test_a_layer_compiled_before_computes_with_its_factors():
    model = net()
    model[0].compile(backend="eager")
    model(X)
    model = fedpara.convert(model, gamma=0.3)
    torch.testing.assert_close(model(X), by_hand(model, X))
    model(X).sum().backward()
    assert model[0].x1.grad is not None
    dense = fedpara.to_dense(model)
    torch.testing.assert_close(dense(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_converted_layer_compiled_by_itself_goes_back_to_dense():
    layer = fedpara.convert(nn.Linear(64, 64), gamma=0.3)
    layer.compile(backend="eager")
    layer(X)
    dense = layer.to_dense()
    with torch.no_grad():
        dense.weight.zero_()
        torch.testing.assert_close(dense(X), dense.bias.expand(8, 64))


def test_a_model_compiled_before_follows_its_layers():
    compiled = torch.compile(net(), backend="eager")
    before = compiled(X)
    fedpara.convert(compiled, gamma=0.3)
    inner = compiled._orig_mod
    assert (compiled(X) - before).abs().max() > 1e-3
    torch.testing.assert_close(compiled(X), by_hand(inner, X))
    compiled(X).sum().backward()
    assert inner[0].x1.grad is not None


def test_a_layer_with_a_forward_of_its_own_stays_dense():
    model = net()
    old = model[0].forward
    model[0].forward = lambda x: 2 * old(x)
    weight = model[0].weight
    model = fedpara.convert(model, gamma=0.3)
    assert model[0].weight is weight
    assert "its forward was replaced" in notes(model)["0"]
    assert isinstance(model[2], FactorisedLayer)
    expected = F.linear(F.relu(2 * F.linear(X, weight, model[0].bias)), model[2].weight)
    torch.testing.assert_close(model(X), expected + model[2].bias)


def test_a_frozen_weight_is_never_replaced_by_fresh_factors():
    """Sinusoidal positions, say, which some models keep in an embedding that nobody trains."""
    positions = nn.Embedding(80, 64)
    angles = torch.arange(80)[:, None] * torch.exp(-torch.arange(64) / 8)
    positions.weight = nn.Parameter(torch.sin(angles), requires_grad=False)
    model = fedpara.convert(nn.Sequential(positions, nn.Linear(64, 64)), gamma=0.3)
    assert type(model[0]) is nn.Embedding
    assert torch.equal(model[0].weight, torch.sin(angles))
    assert "frozen" in notes(model)["0"]
    assert isinstance(model[1], FactorisedLayer)


@pytest.mark.parametrize("init", ["random", "seeded", "fit"])
def test_a_frozen_weight_stays_dense_whatever_the_start(init):
    """The server fits and the clients do not: what is factorised must not depend on it."""
    model = net()
    model[0].weight.requires_grad_(False)
    model = fedpara.convert(model, gamma=0.3, init=init)
    assert type(model[0]) is nn.Linear
    assert "frozen" in notes(model)["0"]
    assert model[2].x1.requires_grad


def test_two_sides_with_frozen_layers_agree_when_one_of_them_fits():
    def side(init):
        model = net()
        model[0].requires_grad_(False)
        return fedpara.convert(model, gamma=0.3, init=init)

    server, client = fedpara.ModelSpec.of(side("fit")), side("random")
    adopt_plans(client, server)
    server.check_equal(fedpara.ModelSpec.of(client), here="server", there="client")


def test_a_model_that_is_frozen_as_a_whole_is_refused_with_the_reason():
    for init in (None, "fit"):
        with pytest.raises(fedpara.ConversionError, match=r"frozen .*after converting \(0\.weight"):
            fedpara.convert(net().requires_grad_(False), gamma=0.3, init=init)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_a_weight_are_said_to_be_lost(register):
    model = net()
    getattr(model[2].weight, register)(lambda *_: None)
    with pytest.warns(UserWarning, match=r"hooks were registered on 2\.weight before"):
        fedpara.convert(model, gamma=0.3)


def test_hooks_on_what_stays_are_kept_in_silence(recwarn):
    model, seen = net(), []
    model[0].bias.register_hook(seen.append)
    model[0].register_forward_hook(lambda layer, *_: seen.append(layer))
    model = fedpara.convert(model, gamma=0.3)
    model(X).sum().backward()
    assert seen[0] is model[0]
    torch.testing.assert_close(seen[1], model[0].bias.grad)
    assert not recwarn.list


def test_ddp_around_a_dense_model_is_refused():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(fedpara.ConversionError, match="convert the model first, then wrap"):
            fedpara.convert(wrapped, gamma=0.3)
        assert type(wrapped.module[0]) is nn.Linear
        inside = nn.ModuleDict({"body": wrapped})
        with pytest.raises(fedpara.ConversionError, match="layer 'body' is wrapped"):
            fedpara.convert(inside, gamma=0.3)
        fedpara.convert(wrapped, method="none")
    finally:
        torch.distributed.destroy_process_group()


KINDS = {
    "weight": lambda: nn.Linear(64, 64),
    "weight_hh_l0": lambda: nn.LSTM(64, 64),
    "in_proj_weight": lambda: nn.MultiheadAttention(64, 4),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("wrap", [nn.Parameter, torch.Tensor.clone, lambda _: None])
def test_a_composed_weight_cannot_be_assigned(name, wrap):
    layer = fedpara.convert(KINDS[name](), gamma=0.3)
    before = getattr(layer, name).detach().clone()
    names = list(layer.state_dict())
    with pytest.raises(fedpara.ConversionError, match=f"{name} of this .* cannot be assigned"):
        setattr(layer, name, wrap(torch.zeros_like(before)))
    torch.testing.assert_close(getattr(layer, name), before)
    assert list(layer.state_dict()) == names


def test_what_is_not_composed_can_be_assigned():
    layer = fedpara.convert(nn.Linear(64, 64), gamma=0.3)
    layer.bias = nn.Parameter(torch.zeros(64))
    layer.x1 = nn.Parameter(torch.zeros_like(layer.x1))
    layer.note = "mine"
    assert not layer(X).any()
    assert copy.deepcopy(layer).note == "mine"
