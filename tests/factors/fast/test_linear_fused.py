"""Linear layers whose weight the kernels never write down, nor its gradient, against float64."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fedpara_plugins as fedpara
from fedpara_plugins.factors.fast import linear, native, native_library
from fedpara_plugins.factors.fast.native_library import find_kernels

pytestmark = pytest.mark.skipif(
    find_kernels().kernels is None and os.environ.get("FEDPARA_KERNELS") != "required",
    reason="fedpara-plugins-kernels is not installed; `tox run -e kernels` installs it",
)

SIZES = [(40, 9, 1), (131, 141, 23), (257, 50, 16), (300, 280, 5), (117, 400, 40)]
"""Inputs, outputs and ranks: no multiples of the kernels' tiles and blocks."""


@pytest.fixture(autouse=True)
def never_by_factors(monkeypatch):
    monkeypatch.setattr(linear, "_few", lambda plan, inputs, kernels: False)


@pytest.fixture
def products(monkeypatch):
    """The gradients by outputs that the kernels were asked to take back."""
    seen, old = [], native.linear_gradients

    def gradients(form, factors, inputs, d_output, needed):
        seen.append(d_output)
        return old(form, factors, inputs, d_output, needed)

    monkeypatch.setattr(native, "linear_gradients", gradients)
    return seen


def converted(n, m, rank, *, method="pfedpara", bias=True):
    torch.manual_seed(5)
    dense = nn.Linear(n, m, bias=bias)
    layer = fedpara.convert(dense, method=method, rank=rank, min_size=0, variance=1 / n)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def exact(layer, x):
    """The layer's output in float64 by einsum, and what it was made from."""
    leaves = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    inputs = x.detach().double().requires_grad_()
    plan = layer.plans["weight"]
    one, two = (torch.einsum("or,ir->oi", leaves[f"x{i}"], leaves[f"y{i}"]) for i in (1, 2))
    weight = plan.scale * one * (two + (plan.method.name == "pfedpara"))
    output = torch.einsum("...i,oi->...o", inputs, weight)
    return output + leaves.get("bias", 0.0), [inputs, *leaves.values()]


def close(got, wanted, tolerance=4e-6):
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < tolerance, error


def check(layer, x, products):
    output = layer(x)
    probe = torch.randn_like(output)
    got = torch.autograd.grad(output, [x, *layer.parameters()], probe)
    expected, leaves = exact(layer, x)
    close([output], [expected.detach()])
    close(got, torch.autograd.grad(expected, leaves, probe.double()))
    assert [one.shape for one in products] == [output.shape]


@pytest.mark.parametrize("method", ["fedpara", "pfedpara"])
@pytest.mark.parametrize("batch", [(1,), (7,), (2, 3, 5), (130,)])
@pytest.mark.parametrize(("n", "m", "rank"), SIZES)
def test_output_and_gradients(n, m, rank, batch, method, products):
    check(
        converted(n, m, rank, method=method), torch.randn(*batch, n, requires_grad=True), products
    )


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_divide_the_work(threads, products, monkeypatch):
    monkeypatch.setattr(native_library, "PARALLEL", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(converted(300, 280, 5), torch.randn(33, 300, requires_grad=True), products)
    finally:
        torch.set_num_threads(before)


def test_without_bias_and_for_one_input_alone(products):
    check(converted(131, 141, 23, bias=False), torch.randn(131, requires_grad=True), products)


def test_inputs_and_gradients_that_are_not_contiguous(products):
    layer = converted(131, 141, 23)
    x = torch.randn(131, 6).T.requires_grad_()
    probe = torch.randn(141, 6).T
    got = torch.autograd.grad(layer(x), [x, *layer.parameters()], probe)
    expected, leaves = exact(layer, x)
    close(got, torch.autograd.grad(expected, leaves, probe.double()))
    assert len(products) == 1


def test_a_first_layer_and_frozen_halves(products):
    layer = converted(131, 141, 23)
    for name in ("x2", "y2", "bias"):
        layer.get_parameter(name).requires_grad_(False)
    x = torch.randn(9, 131)
    layer(x).sum().backward()
    expected, leaves = exact(layer, x)
    wanted = dict(
        zip(
            ["input", *dict(layer.named_parameters())],
            torch.autograd.grad(expected.sum(), leaves),
            strict=True,
        )
    )
    close([layer.x1.grad, layer.y1.grad], [wanted["x1"], wanted["y1"]])
    assert layer.x2.grad is None
    assert layer.bias.grad is None
    assert len(products) == 1


def test_only_the_bias_and_the_inputs_are_trained(products):
    layer = converted(40, 9, 1)
    for factor in layer.factors("weight").values():
        factor.requires_grad_(False)
    x = torch.randn(3, 40, requires_grad=True)
    layer(x).sum().backward()
    expected, leaves = exact(layer, x)
    wanted = torch.autograd.grad(expected.sum(), leaves)
    close([x.grad, layer.bias.grad], [wanted[0], torch.full((9,), 3.0, dtype=torch.float64)])
    assert not products


def test_gradients_of_gradients(products):
    layer = converted(40, 9, 3)
    x = torch.randn(4, 40, requires_grad=True)

    def twice(output, leaves):
        first = torch.autograd.grad(output.square().mean(), leaves, create_graph=True)
        assert not products  # those that are differentiated again go through torch
        return torch.autograd.grad(sum(g.square().mean() for g in first), leaves)

    wanted = twice(*exact(layer, x))
    close(twice(layer(x), [x, *layer.parameters()]), wanted, 2e-5)


def test_checkpoints_give_the_same(products):
    layer = converted(131, 141, 23)
    x = torch.randn(9, 131, requires_grad=True)
    leaves = [x, *layer.parameters()]
    wanted = torch.autograd.grad(layer(x).square().sum(), leaves)
    got = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), leaves)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert len(products) == 2


def test_factors_that_change_before_backward_are_an_error():
    layer = converted(40, 9, 3)
    output = layer(torch.randn(2, 40)).sum()
    with torch.no_grad():
        layer.x1.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_who_asks_for_the_weight_gets_it(products):
    """A hook on composed weights, several passes in one context, more inputs than pay."""
    layer = converted(40, 9, 3)
    seen = []
    layer.on_composed = lambda name, value: seen.append(name)
    layer(torch.randn(2, 40)).sum().backward()
    layer.on_composed = None
    with fedpara.composed_once(layer):
        layer(torch.randn(2, 40)).sum().backward()
    layer(torch.randn(linear.FUSED_INPUTS + 1, 40)).sum().backward()
    assert seen == ["weight"]
    assert not products  # nothing of all this went without the weight


def test_copies_and_no_grad_compute_the_same():
    layer = converted(131, 141, 23)
    x = torch.randn(9, 131)
    wanted = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(layer)(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [3, linear.FUSED_INPUTS + 1])
@pytest.mark.parametrize(
    ("name", "shape"), [("x1", (9, 2)), ("y2", (39, 3)), ("x2", (8, 3)), ("bias", (8,))]
)
def test_a_replaced_parameter_of_another_shape_is_torchs_error(name, shape, batch):
    """And nothing is read beyond its end."""
    layer = converted(40, 9, 3)
    with pytest.raises(RuntimeError):
        torch.func.functional_call(layer, {name: torch.randn(shape)}, torch.randn(batch, 40))


def test_biases_that_torch_broadcasts_or_refuses(products):
    layer, x = converted(40, 9, 3), torch.randn(3, 40)
    one = torch.func.functional_call(layer, {"bias": torch.tensor([2.0])}, x)
    none = torch.func.functional_call(layer, {"bias": torch.zeros(9)}, x)
    torch.testing.assert_close(one, none + 2)
    with pytest.raises(RuntimeError, match="dtype"):
        torch.func.functional_call(layer, {"bias": torch.zeros(9, dtype=torch.float64)}, x)
