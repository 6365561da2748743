"""The projection against explicit Jacobians and dense least squares, for every kind of layer."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import fedpara_plugins as fedpara
from fedpara_plugins import convert
from fedpara_plugins.exchange.dense_round import DenseRound
from fedpara_plugins.factors.methods import Method
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.projection import Tangent, project, scale_for, solve, update
from fedpara_plugins.layers import BUILTIN_LAYERS, LazyLayer

KINDS = {
    "linear": lambda: nn.Linear(14, 12),
    "conv1d": lambda: nn.Conv1d(12, 10, 3),
    "conv2d": lambda: nn.Conv2d(12, 10, 3),
    "conv2d, groups": lambda: nn.Conv2d(24, 12, 3, groups=2),
    "conv2d, 1x1": lambda: nn.Conv2d(14, 12, 1),
    "conv3d": lambda: nn.Conv3d(8, 8, 2),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(12, 10, 3),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(12, 10, (2, 3)),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(8, 8, 2),
    "embedding": lambda: nn.Embedding(20, 10, padding_idx=3),
    "embedding_bag": lambda: nn.EmbeddingBag(20, 10),
    "lstm": lambda: nn.LSTM(9, 8, num_layers=2, bidirectional=True, proj_size=5),
    "gru": lambda: nn.GRU(9, 8),
    "attention": lambda: nn.MultiheadAttention(12, 2),
    "attention, kdim": lambda: nn.MultiheadAttention(12, 2, kdim=10, vdim=8),
    "attention output": lambda: NonDynamicallyQuantizableLinear(14, 12),
    "transformers_conv1d": lambda: _conv1d(),
}
METHODS = ("lowrank", "fedpara", "pfedpara")


def _conv1d() -> nn.Module:
    return pytest.importorskip(
        "transformers.pytorch_utils", reason="needs transformers: `tox run -e core-models`"
    ).Conv1D(12, 14)


Case = tuple[WeightPlan, dict[str, Tensor]]


def _cases(kind: str, method: str, **options: object) -> list[Case]:
    """The weights of one layer of that kind, with factors that nothing special is true of."""
    torch.manual_seed(0)
    layer = convert(
        KINDS[kind](), **{"method": method, "rank": 2, "min_size": 0, **options}
    ).double()
    found = []
    for name, plan in layer.plans.items():
        # Away from the start: there a private operand is zero, and fewer directions count.
        factors = {
            f: (torch.randn_like(v) * v.std().clamp_min(0.1)).detach()
            for f, v in layer.factors(name).items()
        }
        found.append((plan, factors))
    assert found
    return found


def _jacobian(plan: WeightPlan, factors: dict[str, Tensor]) -> Tensor:
    """By autograd through torch's own operations, shape (entries of W, entries of all factors)."""

    def composed(*values: Tensor) -> Tensor:
        named = dict(zip(plan.factor_names, values, strict=True))
        return plan.compose_plainly(plan.ordered(named))

    values = tuple(factors[name] for name in plan.factor_names)
    parts = torch.autograd.functional.jacobian(composed, values)
    rows = parts[0].shape[0] * parts[0].shape[1]
    return torch.cat([part.reshape(rows, -1) for part in parts], dim=1)


def _flat(plan: WeightPlan, moves: dict[str, Tensor]) -> Tensor:
    return torch.cat([moves[name].flatten() for name in plan.factor_names])


def _wanted(plan: WeightPlan) -> Tensor:
    return torch.randn(plan.shape, dtype=torch.float64).flatten(1)


def test_every_built_in_kind_is_here():
    kinds = {
        k.kind.rpartition(".")[2] if isinstance(k, LazyLayer) else k.kind for k in BUILTIN_LAYERS
    }
    names = {name.split(",")[0] for name in KINDS}
    assert len(kinds) == len(BUILTIN_LAYERS)
    assert {"transformers_conv1d" if "Conv1D" in kind else kind for kind in kinds} == names


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tanh", [False, True], ids=["plain", "tanh"])
@pytest.mark.parametrize("kind", KINDS)
def test_jvp_and_vjp_are_the_jacobian_and_its_transpose(kind, method, tanh):
    for plan, factors in _cases(kind, method, tanh=tanh):
        jacobian, tangent = _jacobian(plan, factors), Tangent(plan, factors)
        moves = {name: torch.randn_like(value) for name, value in factors.items()}
        jvp = tangent.jvp(moves).flatten()
        torch.testing.assert_close(jvp, jacobian @ _flat(plan, moves), rtol=1e-9, atol=1e-11)
        wanted = _wanted(plan)
        vjp = _flat(plan, tangent.vjp(wanted))
        torch.testing.assert_close(vjp, jacobian.T @ wanted.flatten(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_many_iterations_come_to_the_dense_least_squares_solution(kind, method):
    for plan, factors in _cases(kind, method):
        jacobian, wanted = _jacobian(plan, factors), _wanted(plan)
        exact = torch.linalg.lstsq(jacobian, wanted.flatten().unsqueeze(1), driver="gelsd").solution
        moved = jacobian @ exact.squeeze(1)
        share = float(moved @ wanted.flatten() / wanted.square().sum())
        found = solve(Tangent(plan, factors), wanted, iterations=1000)
        reached = jacobian @ _flat(plan, found.moves)
        torch.testing.assert_close(reached, moved, rtol=0, atol=1e-6 * float(moved.norm()))
        assert found.kept == pytest.approx(share, abs=1e-6)
        assert 0.05 < share < 0.95


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_five_iterations_are_close(kind, method):
    for plan, factors in _cases(kind, method):
        tangent, wanted = Tangent(plan, factors), _wanted(plan)
        best = solve(tangent, wanted, iterations=1000).kept
        assert solve(tangent, wanted).kept > 0.7 * best


def test_the_preconditioner_is_worth_its_while_where_factors_are_badly_scaled(monkeypatch):
    """Three iterations with it come further than nine without."""
    ((plan, factors),) = _cases("linear", "fedpara", rank=3)
    factors = {
        n: v * 10.0 ** torch.arange(3, dtype=v.dtype).roll(i)
        for i, (n, v) in enumerate(factors.items())
    }
    tangent, wanted = Tangent(plan, factors), _wanted(plan)
    with_it = solve(tangent, wanted, iterations=3).kept
    monkeypatch.setattr(Tangent, "preconditioner", lambda self: dict)
    assert with_it > solve(tangent, wanted, iterations=9).kept > 0


# The update -------------------------------------------------------------------------------------


def _project(plan, factors, change, **options):
    before = plan.compose(factors)
    return project(plan, factors, before, before + change, **options)


@pytest.mark.parametrize("method", METHODS)
def test_the_update_is_rescaled_by_the_share_that_least_squares_keeps(method):
    """The weight then moves along the change as far as the change itself."""
    ((plan, factors),) = _cases("linear", method)
    jacobian = _jacobian(plan, factors)
    change = 1e-7 * _wanted(plan).view(plan.shape)
    exact = torch.linalg.lstsq(jacobian, change.flatten().unsqueeze(1), driver="gelsd").solution
    moved = (jacobian @ exact).squeeze(1)
    share = float(moved @ change.flatten() / change.square().sum())
    new, kept = _project(plan, factors, change, iterations=1000)
    assert kept == pytest.approx(share, rel=1e-5)
    arrived = (plan.compose(new) - plan.compose(factors)).flatten()
    torch.testing.assert_close(arrived, moved / share, rtol=1e-3, atol=1e-3 * float(change.std()))
    assert float(arrived @ change.flatten() / change.square().sum()) == pytest.approx(1, rel=1e-3)


def test_a_change_that_factors_can_follow_is_followed():
    ((plan, factors),) = _cases("linear", "fedpara")
    small = {name: 1e-6 * torch.randn_like(value) for name, value in factors.items()}
    change = plan.compose({n: factors[n] + small[n] for n in factors}) - plan.compose(factors)
    new, kept = _project(plan, factors, change, iterations=1000)
    assert kept == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(
        plan.compose(new),
        plan.compose(factors) + change,
        rtol=0,
        atol=1e-5 * float(change.abs().max()),
    )


def test_the_scale_is_bounded():
    assert [scale_for(kept) for kept in (1.0, 0.1, 0.02, 0.01, 1e-9, 0.0)] == [
        1,
        10,
        50,
        50,
        50,
        50,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_change_moves_nothing_at_all(dtype):
    for plan, factors in _cases("lstm", "pfedpara"):
        factors = {name: value.to(dtype) for name, value in factors.items()}
        before = plan.compose(factors)
        new, kept = project(plan, factors, before, before.clone())
        assert kept is None
        assert all(torch.equal(new[name], factors[name]) for name in factors)
        assert all(new[name].dtype == dtype for name in factors)


def test_a_change_that_factors_cannot_follow_stays_bounded():
    """Orthogonal to the tangent space, all that is found is rounding noise."""
    ((plan, factors),) = _cases("linear", "lowrank")
    jacobian, wanted = _jacobian(plan, factors), _wanted(plan).flatten()
    within = torch.linalg.lstsq(jacobian, wanted.unsqueeze(1), driver="gelsd").solution
    beyond = (wanted - (jacobian @ within).squeeze(1)).view(plan.shape)
    new, kept = _project(plan, factors, beyond)
    assert kept < 1e-12
    for name, value in factors.items():
        torch.testing.assert_close(new[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e15])
def test_neither_tiny_nor_huge_changes_leave_float32(size):
    ((plan, factors),) = _cases("conv2d", "fedpara")
    factors = {name: value.float() for name, value in factors.items()}
    change = _wanted(plan).float().view(plan.shape)
    zero = torch.zeros_like(change)
    one, kept = project(plan, factors, zero, 1e-4 * change)
    other, also = project(plan, factors, zero, size * change)
    assert also == pytest.approx(kept, rel=1e-3)
    assert torch.isfinite(plan.compose(other)).all()
    for name, value in factors.items():
        assert torch.isfinite(other[name]).all()
        expected = size / 1e-4 * (one[name] - value)
        if size == 1e-3:  # less is rounded away in the sum with the factor, more goes too far
            torch.testing.assert_close(
                other[name] - value, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())
            )


@pytest.mark.parametrize("times", [0.3, 1.0, 3.0, 1e6])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_weight_that_training_moved_far_does_not_overshoot(kind, method, times):
    """Of a change as large as the weight, second and fourth order take over."""
    for plan, factors in _cases(kind, method):
        weight = plan.compose(factors)
        change = _wanted(plan).view(plan.shape).to(weight.dtype)
        change *= times * weight.norm() / change.norm()
        new, _ = _project(plan, factors, change)
        moved = plan.compose(new) - weight
        along = float((moved * change).sum() / change.square().sum())
        assert 0 < along <= 1.06
        assert moved.norm() <= 1.01 * max(0.75 * weight.norm(), 0.5 * change.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("times", [1e-30, 1e-9, 1e-8, 1e-7])
def test_a_tiny_change_is_not_shortened(method, times, monkeypatch):
    """Though the difference of two composed weights is rounding there, and points anywhere."""
    lengths, plain = [], update._step_length
    monkeypatch.setattr(update, "_step_length", lambda *a: lengths.append(plain(*a)) or lengths[-1])
    ((plan, factors),) = _cases("linear", method)
    factors = {name: value.float() for name, value in factors.items()}
    for seed in range(10):
        torch.manual_seed(seed)
        change = times * torch.randn(plan.shape)
        project(plan, factors, torch.zeros_like(change), change)
    assert lengths == [1.0] * 10


@pytest.mark.parametrize("method", METHODS)
def test_a_long_round_keeps_what_training_has_learned(method):
    """A round in which weights move further than they are long: the projection still learns."""
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    y = (x @ torch.randn(32, 6)).argmax(1)
    plain = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 6))
    options = {"method": method, "gamma": 0.1, "init": "seeded", "variance": "torch"}
    model = fedpara.convert(copy.deepcopy(plain), **options)
    spec = fedpara.ModelSpec.of(model)
    begun = DenseRound(spec, model.state_dict())
    plain.load_state_dict(begun.dense)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9)
    first = float(nn.functional.cross_entropy(plain(x), y).detach())
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    trained = {name: value.clone() for name, value in plain.state_dict().items()}
    (weight,) = spec.weights
    assert (trained[weight] - begun.dense[weight]).norm() > begun.dense[weight].norm()
    plain.load_state_dict(spec.dense_state(begun.to_factors(trained)))
    with torch.no_grad():
        assert nn.functional.cross_entropy(plain(x), y) < first


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_of_deficient_rank(kind, dtype):
    """Equal columns make every Gram matrix singular; least squares still has its solution."""
    ((plan, factors),) = _cases(kind, "fedpara")
    for value in factors.values():
        if value.dim() == 2:
            value[:, 1] = value[:, 0]
        else:
            value[1] = value[0]
            value[:, 1] = value[:, 0]
    jacobian, wanted = _jacobian(plan, factors), _wanted(plan)
    exact = torch.linalg.lstsq(jacobian, wanted.flatten().unsqueeze(1), driver="gelsd").solution
    share = float((jacobian @ exact).squeeze(1) @ wanted.flatten() / wanted.square().sum())
    tangent = Tangent(plan, {name: value.to(dtype) for name, value in factors.items()})
    found = solve(tangent, wanted.to(dtype), iterations=60)
    assert found.kept == pytest.approx(share, abs=1e-4)
    largest = max(float(value.abs().max()) for value in found.moves.values())
    assert largest < 1e3 * float(exact.abs().max())


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_pfedpara_at_its_start_moves_both_halves(kind):
    """There the private operand is zero, by one zero factor: the others move nothing, and stay."""
    torch.manual_seed(0)
    layer = convert(KINDS[kind](), method="pfedpara", rank=2, min_size=0).double()
    ((name, plan),) = layer.plans.items()
    factors = {n: v.detach() for n, v in layer.factors(name).items()}
    new, kept = _project(plan, factors, 1e-3 * _wanted(plan).view(plan.shape))
    moved = {n for n in factors if not torch.equal(new[n], factors[n])}
    still = {n for n in plan.private_names if not plan.zero_at_start(n)}
    assert moved == set(factors) - still
    shared = {n: v for n, v in factors.items() if n not in plan.private_names}
    alone = convert(KINDS[kind](), method="lowrank", rank=2, min_size=0).double().plans[name]
    lower = solve(Tangent(alone, shared), _wanted(plan), iterations=1000).kept
    assert kept > lower > 0


def test_a_zero_padding_row_stays_zero():
    torch.manual_seed(0)
    layer = convert(KINDS["embedding"](), method="fedpara", rank=2, min_size=0)
    ((name, plan),) = layer.plans.items()
    factors = {n: v.detach() for n, v in layer.factors(name).items()}
    change = torch.randn(plan.shape)
    change[3] = 0  # torch gives it no gradient
    new, _ = _project(plan, factors, change)
    assert not plan.compose(new)[3].any()
    assert not new["x1"][3].any()
    assert plan.compose(new)[2].any()


def test_half_precision_is_solved_in_single():
    ((plan, factors),) = _cases("linear", "fedpara")
    half = {name: value.bfloat16() for name, value in factors.items()}
    single = {name: value.float() for name, value in half.items()}
    before = plan.compose(half)
    after = before + torch.randn_like(before)
    new, kept = project(plan, half, before, after)
    exact, also = project(plan, single, before.float(), after.float())
    assert kept == also
    for name in half:
        assert new[name].dtype == torch.bfloat16
        assert torch.equal(new[name], exact[name].bfloat16())
    wide, _ = project(plan, half, before, after.double())  # a trainer that answers in float64
    assert {value.dtype for value in wide.values()} == {torch.bfloat16}


def test_a_third_party_s_method_is_projected_too():
    """Three operands, one private: anything that combines elementwise."""
    method = Method(
        name="three",
        operands=3,
        combine=lambda o: o[0] * torch.sin(o[1]) + o[0] * o[2] ** 2,
        speed=0.5,
        private=frozenset({2}),
    )
    ((known, _),) = _cases("conv1d", "fedpara")
    plan = replace(known, method=method)
    factors = {
        name: torch.randn(plan.factor_shape(name), dtype=torch.float64)
        for name in plan.factor_names
    }
    jacobian, tangent, wanted = _jacobian(plan, factors), Tangent(plan, factors), _wanted(plan)
    vjp = _flat(plan, tangent.vjp(wanted))
    torch.testing.assert_close(vjp, jacobian.T @ wanted.flatten(), rtol=1e-9, atol=1e-11)
    moves = {name: torch.randn_like(value) for name, value in factors.items()}
    jvp = tangent.jvp(moves).flatten()
    torch.testing.assert_close(jvp, jacobian @ _flat(plan, moves), rtol=1e-9, atol=1e-11)


def test_neither_the_process_s_defaults_nor_gradients_matter():
    ((plan, factors),) = _cases("linear", "fedpara")
    single = {name: value.float().requires_grad_() for name, value in factors.items()}
    before = plan.compose(single)
    after = before.detach() + 1
    expected, _ = project(plan, single, before, after)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            found, _ = project(plan, single, before, after)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in found.items():
        assert torch.equal(value, expected[name])
        assert not value.requires_grad
