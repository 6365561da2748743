"""The residual form under torch's tools, and layers that do without the composed weight."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fedpara_plugins as fedpara
from fedpara_plugins.layers.base import FactorisedLayer

METHODS = ("lowrank", "fedpara", "pfedpara")
NETS = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)),
        lambda: torch.randn(5, 7, 32),
    ),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 12, 3, stride=2, padding=2, padding_mode="circular"),
            nn.GELU(),
            nn.Conv2d(12, 16, 1, bias=False),
            nn.Conv2d(16, 16, 3, groups=2, dilation=2, padding="same"),
        ),
        lambda: torch.randn(3, 8, 9, 9),
    ),
    "core": (lambda: nn.Sequential(nn.Conv1d(8, 12, 3)), lambda: torch.randn(3, 8, 9)),
}
OPTIONS = {"core": {"core": True}}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(params=NETS)
def case(request, method):
    """A converted net away from its start, its dense twin, and inputs."""
    torch.manual_seed(0)
    build, inputs = NETS[request.param]
    options = {"rank": 4, "min_size": 0, **OPTIONS.get(request.param, {})}
    model = fedpara.convert(build(), method=method, base="frozen", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, fedpara.to_dense(model), inputs()


def near(got, expected, limit=1e-4):
    torch.testing.assert_close(got, expected, rtol=limit, atol=limit)


def test_torch_s_ways_to_run_it_give_the_dense_outputs(case):
    model, dense, x = case
    expected = dense(x).detach()
    with torch.inference_mode():
        near(model(x), expected)
    near(torch.func.vmap(model)(x), expected)
    torch.compiler.reset()  # the number of compiled versions of a forward is limited
    near(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    near(torch.fx.symbolic_trace(model)(x), expected)
    near(torch.jit.trace(model, x)(x), expected)
    with fedpara.composed_once(model):
        near(model(x), expected)
    assert model(x[:0]).shape == (0, *expected.shape[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = model(x), dense(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    near(found, expected, 0.1)


def test_gradients_of_gradients_are_the_dense_ones(case):
    model, dense, x = case
    found = []
    for net in (model, dense):
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(inputs).square().sum(), inputs, create_graph=True)
        found.append((slope, *torch.autograd.grad(slope.square().sum(), inputs)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("way", ["checkpoint", "composed_once", "recompute"])
def test_gradients_are_the_same_by_every_way(case, way):
    model, _, x = case
    other = copy.deepcopy(model)
    model(x).square().mean().backward()
    if way == "checkpoint":
        checkpoint(other, x, use_reentrant=False).square().mean().backward()
    elif way == "composed_once":
        with fedpara.composed_once(other):
            other(x).square().mean().backward()
    else:
        for layer in other.modules():
            for plan in layer.plans.values() if isinstance(layer, FactorisedLayer) else ():
                object.__setattr__(plan, "recompute", False)
                plan.__dict__.pop("recomputes", None)
        other(x).square().mean().backward()
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == name.endswith("_base")
        if parameter.grad is not None:
            near(twin.grad, parameter.grad)
            assert parameter.grad.stride() == parameter.stride()


def test_a_base_that_is_unfrozen_trains_as_a_dense_weight_does(case):
    model, dense, x = case
    for layer in model.modules():
        for name in layer.plans if isinstance(layer, FactorisedLayer) else ():
            layer.base(name).requires_grad_()
    model(x).square().mean().backward()
    dense(x).square().mean().backward()
    gradients = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith("_base"):
            near(parameter.grad, gradients[name.removesuffix("_base")].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_and_factors_have_more(method, dtype):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 48), nn.Unflatten(1, (3, 16)), nn.Conv1d(3, 5, 3)).to(dtype)
    x = torch.randn(4, 32, dtype=dtype)
    expected = dense(x)
    model = fedpara.convert(copy.deepcopy(dense), method=method, base="frozen", rank=2, min_size=0)
    found = model(x)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert {n: p.dtype for n, p in model[0].named_parameters() if n in ("weight_base", "x1")} == {
        "weight_base": dtype,
        "x1": torch.float32,
    }
    found.float().square().sum().backward()
    assert model[0].x1.grad.dtype == torch.float32
    back = fedpara.to_dense(model).state_dict()
    assert all(torch.equal(back[name], value) for name, value in dense.state_dict().items())


def test_a_padding_row_keeps_its_values(method):
    torch.manual_seed(0)
    dense = nn.Embedding(40, 32, padding_idx=3)
    with torch.no_grad():
        dense.weight[3] = 2.0
    model = fedpara.convert(nn.Sequential(dense), method=method, base="frozen", rank=4)
    tokens = torch.tensor([[1, 3], [3, 5]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for indices in (tokens, torch.arange(40).view(1, -1)):  # by rows, and the whole table
        optimizer.zero_grad()
        model(indices).square().sum().backward()
        optimizer.step()
    assert bool((model(tokens)[0, 1] == 2.0).all())
    assert not bool((model(tokens)[0, 0] == model[0].weight_base[1]).any())


def test_weights_are_neither_composed_nor_have_gradients_of_their_size():
    """Both would hold as many values as the weight, which low rank never needs."""
    model = fedpara.convert(
        nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)), method="lowrank", base="frozen",
        rank=2,
    )  # fmt: skip
    x = torch.randn(4, 512)
    model(x).sum().backward()
    with torch.profiler.profile(profile_memory=True) as recorded:
        model(x).sum().backward()
    assert max(event.cpu_memory_usage for event in recorded.events()) < 512 * 512


def test_resetting_draws_a_new_update_of_zero_and_keeps_the_base():
    model = fedpara.convert(nn.Sequential(nn.Linear(64, 64)), method="lowrank", base="frozen")
    base = model[0].weight_base.clone()
    with torch.no_grad():
        model[0].x1.add_(1)
    model[0].reset_parameters()
    assert torch.equal(model[0].weight_base, base)
    assert torch.equal(model[0].weight, base)
