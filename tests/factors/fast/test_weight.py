"""The hand-written composition against explicit sums in float64, and where it must not run."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, jvp, vmap

import fedpara_plugins as fedpara
from fedpara_plugins.cli.doctor import check_model
from fedpara_plugins.factors.fast import conditions, operands, weight
from fedpara_plugins.factors.methods import Method
from fedpara_plugins.factors.plan import compose_together

CASES = list(
    itertools.product(
        ("lowrank", "fedpara", "pfedpara"), (False, True), ("matrix", "kernel"), (False, True)
    )
)


def planned(method, tanh, shape, recompute):
    """A plan, and random float64 factors for it."""
    dense = nn.Linear(16, 14) if shape == "matrix" else nn.Conv2d(6, 7, (3, 2))
    layer = fedpara.convert(dense, method=method, tanh=tanh, rank=3, min_size=0, variance=20.0)
    plan = replace(layer.plans["weight"], recompute=recompute)
    torch.manual_seed(1)
    values = [torch.randn(plan.factor_shape(n), dtype=torch.float64) for n in plan.factor_names]
    return plan, [value.requires_grad_() for value in values]


def node_of(composed):
    """What made a weight in autograd: of a kernel's, behind its view."""
    node = composed.grad_fn
    return node if composed.dim() == 2 else node.next_functions[0][0]


def by_sums(plan, factors):
    """W by einsum over named factors, written without the library's composition."""
    f = dict(zip(plan.factor_names, factors, strict=True))
    values = []
    for i in range(1, plan.method.operands + 1):
        if f"t{i}" in f:
            values.append(torch.einsum("pq...,op,iq->oi...", f[f"t{i}"], f[f"x{i}"], f[f"y{i}"]))
        else:
            values.append(torch.einsum("or,ir->oi", f[f"x{i}"], f[f"y{i}"]))
    scale = plan.scale
    if plan.tanh:
        scale = max(1.0, 4 * plan.variance**0.5)
        shared = plan.method.operands - len(plan.method.private)
        gain = (plan.scale / scale) ** (1 / shared)
        values = [
            torch.tanh(v if i in plan.method.private else gain * v) for i, v in enumerate(values)
        ]
    if plan.method.name == "lowrank":
        return scale * values[0]
    return scale * values[0] * (values[1] + (1.0 if plan.method.name == "pfedpara" else 0.0))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of three rows or so: several of them, the last one smaller."""
    monkeypatch.setattr(operands, "BLOCK_BYTES", 8 * 16 * 3)


@pytest.mark.parametrize(("method", "tanh", "shape", "recompute"), CASES)
def test_value_and_both_derivatives(method, tanh, shape, recompute):
    plan, factors = planned(method, tanh, shape, recompute)

    def compose(*values):
        return plan.compose(dict(zip(plan.factor_names, values, strict=True)))

    node = node_of(compose(*factors))
    assert type(node).__name__ == "_ComposeBackward"
    torch.testing.assert_close(compose(*factors), by_sums(plan, factors))
    probe = torch.randn(plan.shape, dtype=torch.float64)
    got = torch.autograd.grad((compose(*factors) * probe).sum(), factors)
    expected = torch.autograd.grad((by_sums(plan, factors) * probe).sum(), factors)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert gradcheck(compose, factors)
    assert gradgradcheck(compose, factors, fast_mode=True)


def test_factors_of_another_shape_are_an_error_and_no_other_weight():
    plan, factors = planned("fedpara", False, "matrix", True)
    named = dict(zip(plan.factor_names, factors, strict=True))
    fewer = {name: f[:-1] if name[0] == "x" else f for name, f in named.items()}
    with pytest.raises(RuntimeError, match="shape"):
        plan.compose(fewer)
    with pytest.raises(RuntimeError, match="shape"):
        compose_together([plan, plan], [named, fewer])


SEVERAL = (
    ("fedpara", False, "matrix", True),
    ("pfedpara", True, "kernel", False),  # holds its products and cores
    ("lowrank", False, "matrix", None),
    ("fedpara", False, "kernel", False),
)


def several():
    """Four plans of all sorts, all their factors, and a function of the latter: all weights."""
    plans, factors = zip(*[planned(*case) for case in SEVERAL], strict=True)
    flat = [factor for own in factors for factor in own]

    def compose(*values):
        left = iter(values)
        named = [{name: next(left) for name in plan.factor_names} for plan in plans]
        return tuple(compose_together(plans, named))

    return plans, factors, flat, compose


def test_several_weights_are_one_node_and_have_their_own_values_and_derivatives():
    plans, factors, flat, compose = several()
    weights = compose(*flat)
    nodes = {node_of(weight) for weight in weights}
    assert [type(node).__name__ for node in nodes] == ["_ComposeBackward"]
    for plan, own, composed in zip(plans, factors, weights, strict=True):
        torch.testing.assert_close(composed, by_sums(plan, own), rtol=1e-12, atol=1e-12)
    assert gradcheck(compose, flat, fast_mode=True)
    assert gradgradcheck(compose, flat, fast_mode=True)


@pytest.mark.parametrize("used", range(len(SEVERAL)))
def test_a_weight_that_nothing_used_gives_its_factors_no_gradients(used):
    plans, factors, flat, compose = several()
    probe = torch.randn(plans[used].shape, dtype=torch.float64)
    expected = torch.autograd.grad(
        (by_sums(plans[used], factors[used]) * probe).sum(), factors[used]
    )
    (compose(*flat)[used] * probe).sum().backward()
    for i, own in enumerate(factors):
        for k, factor in enumerate(own):
            if i == used:
                torch.testing.assert_close(factor.grad, expected[k], rtol=1e-12, atol=1e-12)
            else:
                assert factor.grad is None


def test_frozen_weights_among_several():
    plans, factors, flat, compose = several()
    for factor in factors[0] + factors[3][:1]:
        factor.requires_grad_(False)
    total = sum((w * w).sum() for w in compose(*flat))
    wanted = [f for f in flat if f.requires_grad]
    found = torch.autograd.grad(total, wanted)
    explicit = sum((by_sums(p, f) ** 2).sum() for p, f in zip(plans, factors, strict=True))
    for own, other in zip(found, torch.autograd.grad(explicit, wanted), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_several_weights_of_which_one_must_be_composed_plainly():
    plans, factors, *_ = several()
    combine = plans[1].method.combine
    own_method = replace(plans[1].method, combine=lambda operands: 2 * combine(operands))
    plans = (plans[0], replace(plans[1], method=own_method, tanh=False), *plans[2:])
    named = [dict(zip(p.factor_names, f, strict=True)) for p, f in zip(plans, factors, strict=True)]
    for plan, own, composed in zip(plans, named, compose_together(plans, named), strict=True):
        torch.testing.assert_close(composed, plan.compose(own), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        composed = compose_together(plans[:1], [{k: v.float() for k, v in named[0].items()}])
    assert composed[0].dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_factors_get_no_gradient_and_the_others_theirs(frozen):
    plan, factors = planned("pfedpara", False, "kernel", False)
    factors[frozen].requires_grad_(False)
    plan.compose(dict(zip(plan.factor_names, factors, strict=True))).square().sum().backward()
    own = [factor.grad for factor in factors]
    assert own[frozen] is None
    rest = [factor for factor in factors if factor.requires_grad]
    expected = torch.autograd.grad(by_sums(plan, factors).square().sum(), rest)
    for mine, theirs in zip((g for g in own if g is not None), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("frozen", range(4))
def test_gradients_of_gradients_with_a_frozen_factor(frozen):
    plan, factors = planned("fedpara", True, "matrix", True)
    factors[frozen].requires_grad_(False)
    rest = [factor for factor in factors if factor.requires_grad]

    def twice(weight):
        first = torch.autograd.grad(weight.square().sum(), rest, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), rest)

    composed = plan.compose(dict(zip(plan.factor_names, factors, strict=True)))
    for mine, theirs in zip(twice(composed), twice(by_sums(plan, factors)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_two_backward_passes_through_one_composition():
    plan, factors = planned("fedpara", False, "matrix", False)
    value = plan.compose(dict(zip(plan.factor_names, factors, strict=True)))
    first = torch.autograd.grad(value.sum(), factors, retain_graph=True)
    second = torch.autograd.grad(value.sum(), factors)
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_held_for_backward(recompute):
    """Two products of the weight's size if they are not computed again, none if they are."""
    plan, factors = planned("fedpara", False, "matrix", recompute)
    sizes = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        plan.compose(dict(zip(plan.factor_names, factors, strict=True)))
    assert sizes.count(14 * 16) == (0 if recompute else 2)


def test_factors_changed_before_backward_are_noticed():
    plan, factors = planned("fedpara", False, "matrix", True)
    value = plan.compose(dict(zip(plan.factor_names, factors, strict=True)))
    with torch.no_grad():
        factors[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_other_transforms_get_the_same_from_torchs_own_operations(monkeypatch):
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Conv1d(12, 10, 3), rank=4, min_size=0).double()
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    x = torch.randn(2, 12, 5, dtype=torch.float64)
    moves = {k: torch.randn_like(v) for k, v in parameters.items()}
    monkeypatch.setattr(weight._Compose, "apply", None)  # whoever calls it fails

    def loss(parameters):
        return functional_call(layer, parameters, (x,)).square().sum()

    _, forward = jvp(loss, (parameters,), (moves,))
    gradient = torch.func.grad(loss)(parameters)
    backward = sum((gradient[k] * moves[k]).sum() for k in moves)
    torch.testing.assert_close(forward, backward)
    stacked = {k: torch.stack([v, 2 * v]) for k, v in parameters.items()}
    both = vmap(loss)(stacked)
    torch.testing.assert_close(both[0], loss_plainly(layer, parameters, x))
    with forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(v, moves[k]) for k, v in parameters.items()}
        torch.testing.assert_close(forward_ad.unpack_dual(loss(duals)).tangent, forward)


def loss_plainly(layer, parameters, x):
    factors = [parameters[name] for name in layer.plans["weight"].factor_names]
    kernel = by_sums(layer.plans["weight"], factors)
    return nn.functional.conv1d(x, kernel, parameters["bias"]).square().sum()


def test_autocast_gives_the_weight_and_the_factors_their_dtypes():
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Conv2d(32, 32, 3), method="fedpara")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = layer.weight
        layer(torch.randn(2, 32, 4, 4)).float().square().sum().backward()
    assert value.dtype == torch.bfloat16
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    torch.testing.assert_close(value.float(), layer.weight, rtol=0.1, atol=0.02)


def test_a_method_of_a_third_party_is_composed_by_its_own_function():
    """With a function that is not known here: the same name and number of operands do not do."""
    plan, factors = planned("fedpara", False, "matrix", None)
    sine = Method(name="fedpara", operands=2, combine=lambda w: w[0] * torch.sin(w[1]), speed=0.5)
    other = replace(plan, method=sine)
    assert plan.form is not None
    assert other.form is None
    x1, y1, x2, y2 = factors
    value = other.compose(dict(zip(plan.factor_names, factors, strict=True)))
    torch.testing.assert_close(value, plan.scale * (x1 @ y1.T) * torch.sin(x2 @ y2.T))


def test_mixed_dtypes_are_left_to_torch():
    half, single = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    assert conditions.may_run([single, None, single])
    assert not conditions.may_run([single, half])
    assert not conditions.may_run([torch.zeros(2, dtype=torch.int64)])


def test_the_doctor_says_what_falls_back():
    found = [
        str(line)
        for line in check_model(nn.Linear(64, 64), fedpara.FedParaConfig(method="fedpara"))
    ]
    assert any("torch.compile" in line and "torch.func" in line for line in found)
