"""The kernels of fedpara-plugins-kernels against sums in float64, and when they are not used."""

import contextlib
import os
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.cli.environment import check_environment
from fedpara_plugins.factors.fast import linear, native, native_library
from fedpara_plugins.factors.fast.native_library import find_kernels

INSTALLED = find_kernels().kernels is not None
REQUIRED = os.environ.get("FEDPARA_KERNELS") == "required"  # in the tox environment `kernels`
needs_kernels = pytest.mark.skipif(
    not INSTALLED and not REQUIRED,
    reason="fedpara-plugins-kernels is not installed; `tox run -e kernels` installs it",
)

LAYERS = {
    "few rows": lambda: nn.Linear(40, 9),
    "no multiple of anything": lambda: nn.Linear(131, 141),
    "a last block of one column": lambda: nn.Linear(257, 50),
    "several blocks each way": lambda: nn.Linear(300, 280),
    "kernels": lambda: nn.Conv2d(37, 29, 3),
    "groups": lambda: nn.Conv2d(64, 60, 3, groups=2),
    "3d": lambda: nn.Conv3d(13, 21, (3, 2, 1)),
}
CASES = [
    ("few rows", 1),
    ("few rows", 2),
    ("no multiple of anything", 1),
    ("no multiple of anything", 19),
    ("no multiple of anything", 23),
    ("a last block of one column", 16),
    ("several blocks each way", 5),
    ("several blocks each way", 26),
    ("several blocks each way", 48),
    ("kernels", 1),
    ("kernels", 3),
    ("kernels", 17),
    ("groups", 12),
    ("3d", 5),
]
"""Kinds of layers, and ranks."""


def converted(name, method, rank):
    torch.manual_seed(3)
    layer = fedpara.convert(LAYERS[name](), method=method, rank=rank, min_size=0)
    with torch.no_grad():
        for factor in layer.factors("weight").values():
            factor.copy_(torch.randn_like(factor))
    return layer


def in_float64(layer):
    """W by einsum, and the factors that it was made from."""
    plan = layer.plans["weight"]
    factors = {n: f.detach().double().requires_grad_() for n, f in layer.factors("weight").items()}
    values = []
    for i in (1, 2):
        x, y, t = (factors.get(f"{letter}{i}") for letter in "xyt")
        if t is None:
            values.append(torch.einsum("or,ir->oi", x, y))
        else:
            values.append(torch.einsum("pq...,op,iq->oi...", t, x, y))
    shift = 1.0 if plan.method.name == "pfedpara" else 0.0
    return plan.scale * values[0] * (values[1] + shift), list(factors.values())


def expected(layer, probe):
    """W and the gradients of (W * probe).sum() by every factor."""
    weight, factors = in_float64(layer)
    return weight.detach(), torch.autograd.grad((weight * probe.double()).sum(), factors)


def close(got, wanted):
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < 2e-6, error


@pytest.fixture
def calls(monkeypatch):
    """How often the kernels are called."""
    count = SimpleNamespace(compose=0, gradients=0, linear=0)

    def counted(name, old):
        def call(*args, **named):
            setattr(count, name, getattr(count, name) + 1)
            return old(*args, **named)

        return call

    for name in ("compose", "gradients", "linear"):
        monkeypatch.setattr(native, name, counted(name, getattr(native, name)))
    return count


@needs_kernels
@pytest.mark.parametrize("method", ["fedpara", "pfedpara"])
@pytest.mark.parametrize(("name", "rank"), CASES)
def test_weight_and_gradients(name, method, rank, calls):
    layer = converted(name, method, rank)
    calls.compose = 0
    weight = layer.weight
    probe = torch.randn_like(weight)
    got = torch.autograd.grad(weight, list(layer.factors("weight").values()), probe)
    value, gradients = expected(layer, probe)
    assert (calls.compose, calls.gradients) == (1, 1)
    close(weight, value)
    for mine, theirs in zip(got, gradients, strict=True):
        close(mine, theirs)


@needs_kernels
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_divide_the_work(threads, monkeypatch):
    monkeypatch.setattr(native_library, "PARALLEL", 1)
    used = set()

    def noted(old):
        def call(task, a, b):
            used.add((a, b))
            old(task, a, b)

        return call

    kernels = find_kernels().kernels
    for name in ("compose", "gradients", "linear"):
        monkeypatch.setattr(kernels, name, noted(getattr(kernels, name)))
    layer = converted("kernels", "pfedpara", 7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    used.clear()
    try:
        weight = layer.weight
        probe = torch.randn_like(weight)
        got = torch.autograd.grad(weight, list(layer.factors("weight").values()), probe)
    finally:
        torch.set_num_threads(before)
    assert len(used) == threads  # 333 columns are three blocks
    value, gradients = expected(layer, probe)
    close(weight, value)
    for mine, theirs in zip(got, gradients, strict=True):
        close(mine, theirs)


@needs_kernels
def test_half_of_the_factors_frozen(calls):
    layer = converted("several blocks each way", "pfedpara", 6)
    for name in ("x2", "y2"):
        layer.get_parameter(name).requires_grad_(False)
    weight = layer.weight
    probe = torch.randn_like(weight)
    (weight * probe).sum().backward()
    _, gradients = expected(layer, probe)
    close(layer.x1.grad, gradients[0])
    close(layer.y1.grad, gradients[1])
    assert layer.x2.grad is None
    assert layer.y2.grad is None
    assert calls.gradients == 1


@needs_kernels
@pytest.mark.parametrize("name", ["several blocks each way", "kernels"])
@pytest.mark.parametrize("at", [0, -1])
def test_factors_that_are_not_contiguous_are_left_to_torch(name, at, calls):
    layer = converted(name, "fedpara", 5)
    factor = list(layer.factors("weight").values())[at]
    factor.data = factor.data.transpose(0, 1).contiguous().transpose(0, 1)
    assert not factor.is_contiguous()
    calls.compose = 0
    weight = layer.weight
    probe = torch.randn_like(weight)
    got = torch.autograd.grad(weight, list(layer.factors("weight").values()), probe)
    value, gradients = expected(layer, probe)
    assert calls.compose == 0
    close(weight, value)
    for mine, theirs in zip(got, gradients, strict=True):
        close(mine, theirs)


@needs_kernels
def test_a_gradient_that_is_not_contiguous():
    layer = converted("several blocks each way", "fedpara", 6)
    weight = layer.weight
    probe = torch.randn(weight.shape[::-1]).T
    assert not probe.is_contiguous()
    got = torch.autograd.grad(weight, list(layer.factors("weight").values()), probe)
    for mine, theirs in zip(got, expected(layer, probe)[1], strict=True):
        close(mine, theirs)


@needs_kernels
def test_gradients_of_gradients(calls):
    layer = converted("kernels", "pfedpara", 4)

    def both(weight, factors):
        first = torch.autograd.grad(weight.square().mean(), factors, create_graph=True)
        assert calls.gradients == 0  # those that are differentiated again go through torch
        return torch.autograd.grad(sum(g.square().mean() for g in first), factors)

    wanted = both(*in_float64(layer))
    got = both(layer.weight, list(layer.factors("weight").values()))
    for mine, theirs in zip(got, wanted, strict=True):
        close(mine, theirs)


@needs_kernels
@pytest.mark.parametrize(
    "changed",
    [
        lambda: fedpara.convert(nn.Linear(40, 40), method="fedpara", rank=4, min_size=0).double(),
        lambda: fedpara.convert(nn.Linear(40, 40), method="fedpara", rank=4, min_size=0).bfloat16(),
        lambda: fedpara.convert(nn.Linear(40, 40), method="fedpara", rank=4, min_size=0, tanh=True),
        lambda: fedpara.convert(nn.Conv2d(40, 40, 3), method="lowrank", rank=4, min_size=0),
    ],
)
def test_what_the_kernels_do_not_serve(changed, calls):
    layer = changed()
    calls.compose = 0
    assert torch.isfinite(layer.weight.float()).all()
    assert calls.compose == 0


@needs_kernels
def test_autocast_is_left_to_torch(calls):
    layer = converted("several blocks each way", "fedpara", 6)
    calls.compose = 0
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == torch.bfloat16
    assert calls.compose == 0


@needs_kernels
def test_many_threads_of_python_at_once():
    layers = [converted("kernels", "fedpara", 3 + i) for i in range(6)]
    wanted = [expected(layer, torch.ones_like(layer.weight)) for layer in layers]
    problems = []

    def work(layer, value, gradients):
        for _ in range(20):
            weight = layer.weight
            got = torch.autograd.grad(weight.sum(), list(layer.factors("weight").values()))
            try:
                close(weight, value)
                for mine, theirs in zip(got, gradients, strict=True):
                    close(mine, theirs)
            except AssertionError as error:
                problems.append(error)

    threads = [
        threading.Thread(target=work, args=(layer, *want))
        for layer, want in zip(layers, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


# Without them

BROKEN = {
    "missing": ("raise ModuleNotFoundError('none')", "note", "not installed"),
    "of another processor": ("raise ImportError('needs AVX2')", "attention", "needs AVX2"),
    "another version": ("API = 99\n__version__ = '9'", "attention", "9 does not fit"),
}


@pytest.mark.parametrize(("code", "level", "text"), BROKEN.values(), ids=BROKEN)
def test_without_usable_kernels_torch_composes(code, level, text, tmp_path, monkeypatch):
    (tmp_path / "fedpara_plugins_kernels.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for module in [m for m in __import__("sys").modules if m.startswith("fedpara_plugins_kernels")]:
        monkeypatch.delitem(__import__("sys").modules, module)
    find_kernels.cache_clear()
    try:
        layer = converted("kernels", "fedpara", 4)
        weight = layer.weight
        close(weight, expected(layer, torch.ones_like(weight))[0])
        lines = [f for f in check_environment() if f.subject == "optional fedpara-plugins-kernels"]
        assert [(line.level, text in line.text) for line in lines] == [(level, True)]
    finally:
        find_kernels.cache_clear()


@needs_kernels
@pytest.mark.parametrize(
    ("inputs", "ways"),
    [(7, (0, 0)), (8, (0, 1)), (linear.FUSED_INPUTS, (0, 1)), (linear.FUSED_INPUTS + 1, (1, 0))],
)
def test_which_way_a_linear_layer_takes(inputs, ways, calls):
    """By factors, without the whole weight, or with it."""
    layer = fedpara.convert(nn.Linear(512, 512), method="fedpara", gamma=0.0)
    calls.compose = 0  # conversion composes too
    layer(torch.randn(inputs, 512))
    assert (calls.compose, calls.linear) == ways


@needs_kernels
@pytest.mark.parametrize(("recompute", "composed"), [(None, 1), (True, 0)])
def test_large_linear_layers_are_composed_unless_memory_is_to_be_saved(
    recompute, composed, calls, monkeypatch
):
    monkeypatch.setattr(linear, "BLOCKS_BYTES", 4 * 512 * 512)
    layer = fedpara.convert(nn.Linear(512, 512), method="fedpara", gamma=0.0, recompute=recompute)
    calls.compose = 0  # conversion composes too
    layer(torch.randn(linear.FUSED_INPUTS + 1, 512))
    assert (calls.compose, calls.linear) == (composed, 0)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "shape"),
    [("t2", (4, 4, 1, 3)), ("t1", (4, 3, 3, 3)), ("x2", (7, 4)), ("y1", (5, 4)), ("x1", (9, 3))],
)
def test_a_replaced_factor_of_another_shape_never_reaches_the_kernels(name, shape, calls):
    """They see addresses alone; torch broadcasts it, or says what is wrong."""
    layer = fedpara.convert(nn.Conv2d(8, 9, 3), method="fedpara", rank=4, min_size=0)
    calls.compose = 0  # conversion composes too
    with contextlib.suppress(RuntimeError):
        torch.func.functional_call(layer, {name: torch.randn(shape)}, torch.randn(2, 8, 5, 5))
    assert calls.compose == 0
    layer(torch.randn(2, 8, 5, 5))
    assert calls.compose == 1
