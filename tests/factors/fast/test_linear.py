"""A linear layer's output without its weight, against the dense layer with the same weight."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import fedpara_plugins as fedpara
from fedpara_plugins.factors.fast import linear, linear_factors, native, operands
from fedpara_plugins.factors.fast.native_library import KernelLibrary

METHODS = ("lowrank", "fedpara", "pfedpara")
WAYS = ("by factors", "by blocks")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """One way for every number of inputs; small pieces, so that there are several."""
    monkeypatch.setattr(linear, "_few", lambda plan, inputs, kernels: request.param == "by factors")
    monkeypatch.setattr(linear_factors, "CHUNK_BYTES", 8 * 3 * 20 * 2)
    monkeypatch.setattr(operands, "BLOCK_BYTES", 8 * 18 * 6)
    return request.param


def layer_of(method, *, tanh=False, bias=True):
    torch.manual_seed(0)
    dense = nn.Linear(18, 20, bias=bias)
    options = {"rank": 3, "min_size": 0, "recompute": True, "variance": 20.0}
    layer = fedpara.convert(dense, method=method, tanh=tanh, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@pytest.fixture
def without_kernels(monkeypatch):
    """Whether they are installed or not: they move what pays."""
    monkeypatch.setattr(native, "find_kernels", lambda: KernelLibrary(None, "note", ""))


def never_composed(layer, monkeypatch):
    def refuse(self, weight):
        raise AssertionError("the weight was composed")

    monkeypatch.setattr(type(layer), "composed_weight", refuse)


@pytest.mark.parametrize("shape", [(5, 18), (2, 3, 18), (18,), (1, 18)])
@pytest.mark.parametrize("method", METHODS)
def test_output_and_gradients_equal_the_dense_layers(way, method, shape, monkeypatch):
    layer = layer_of(method)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * probe).sum(), leaves)
    never_composed(layer, monkeypatch)
    output = layer(x)
    torch.testing.assert_close(output, expected)
    got = torch.autograd.grad((output * probe).sum(), leaves)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_gradients(method, tanh, way, monkeypatch):
    layer = layer_of(method, tanh=tanh, bias=False)
    if not (tanh and way == "by factors"):  # which is composed
        never_composed(layer, monkeypatch)
    x = torch.randn(4, 18, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *values):
        monkeypatch.setattr(
            type(layer), "factors", lambda self, weight: dict(zip(names, values, strict=True))
        )
        return layer(x)

    leaves = (x, *layer.parameters())
    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves, fast_mode=True)


def test_inputs_that_need_no_gradient(way):
    layer = layer_of("pfedpara")
    x = torch.randn(4, 18, dtype=torch.float64)
    layer(x).square().sum().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    nn.functional.linear(x, layer.weight, layer.bias).square().sum().backward()
    for mine, parameter in zip(got, layer.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_half_of_a_decoupled_schedule(way):
    layer = layer_of("pfedpara")
    x = torch.randn(4, 18, dtype=torch.float64)
    for phase, still in (("private", {"x1", "y1"}), ("shared", {"x2", "y2"})):
        layer.__dict__["phase"] = phase
        layer.zero_grad()
        output = layer(x)
        output.sum().backward()
        without = {n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()}
        assert without - {"bias"} >= still - ({"y2"} if phase == "private" else set())
        torch.testing.assert_close(output, nn.functional.linear(x, layer.weight, layer.bias))


def test_no_inputs_at_all():
    layer = layer_of("fedpara")
    assert layer(torch.zeros(0, 18, dtype=torch.float64)).shape == (0, 20)


def test_wrong_inputs_get_torchs_own_error():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer_of("fedpara")(torch.zeros(2, 8, dtype=torch.float64))


def test_autocast(way):
    layer = layer_of("fedpara").float()
    x = torch.randn(5, 18)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    expected = layer(x)
    assert (output.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(("inputs", "few"), [(4, True), (22, True), (23, False), (256, False)])
@pytest.mark.usefixtures("without_kernels")
def test_few_inputs_are_multiplied_with_factors(inputs, few, monkeypatch):
    layer = fedpara.convert(nn.Linear(512, 512), method="fedpara", gamma=0.0)
    taken = []
    by_factors = linear.linear_by_factors
    monkeypatch.setattr(
        linear, "linear_by_factors", lambda *a, **k: taken.append(1) or by_factors(*a, **k)
    )
    layer(torch.randn(inputs, 512))
    assert bool(taken) == few


@pytest.mark.parametrize(("recompute", "way"), [(None, True), (True, True), (False, False)])
@pytest.mark.usefixtures("without_kernels")
def test_a_large_weight_is_never_whole(recompute, way, monkeypatch):
    """Above the size from which on it pays; unless the user says to hold."""
    monkeypatch.setattr(linear, "BLOCKS_BYTES", 4 * 512 * 512)
    layer = fedpara.convert(nn.Linear(512, 512), method="fedpara", gamma=0.0, recompute=recompute)
    if way:
        never_composed(layer, monkeypatch)
    assert layer(torch.randn(256, 512)).shape == (256, 512)
    monkeypatch.setattr(linear, "BLOCKS_BYTES", 4 * 512 * 512 + 1)
    if recompute is None:
        with pytest.raises(AssertionError, match="composed"):
            layer(torch.randn(256, 512))
