"""The classification layer with a client's own part, against formulas written out in float64."""

import copy
import io
import pickle

import cloudpickle
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import fedpara_plugins as fedpara
from fedpara_plugins import ModelSpec
from fedpara_plugins.layers.personal import PersonalLinear
from fedpara_plugins.testing.brute_force import reference_weight
from fedpara_plugins.testing.layer_contract import LayerContract
from fedpara_plugins.training.step_hooks import start_round

CLASSES = 40
LABELS = [0, 0, 3, 7, 39, 3, 0]


def net():
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, CLASSES))


def build(*, dense_head=False, **options):
    """A model whose head has both private parts; its weight is factorised or stays dense."""
    torch.manual_seed(0)
    exclude = ("2",) if dense_head else ()
    both = {"private_head": True, "label_prior": True, "schedule": "decoupled"}
    return fedpara.convert(
        net(), **{"method": "pfedpara", "gamma": 0.3, "exclude": exclude, **both, **options}
    )


def scattered(model):
    """Every private part away from zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            for parameter in layer.private_parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def inputs(rows=5):
    return torch.linspace(-1, 1, rows * 64).reshape(rows, 64)


def formula(model, x, *, factors="both", correction=True):
    """The whole model in float64 from its state: explicit sums, none of the library's composition.

    Args:
        factors: ``both`` or ``shared`` halves of pfedpara's weights.
        correction: whether H is in.
    """
    state = {k: v.detach().double() for k, v in model.state_dict().items()}

    def weight(i):
        if f"{i}.weight" in state:
            return state[f"{i}.weight"]
        operand = [
            torch.einsum("or,ir->oi", state[f"{i}.x{j}"], state[f"{i}.y{j}"]) for j in (1, 2)
        ]
        second = operand[1] + 1 if factors == "both" else 1
        return model[i].plans["weight"].scale * operand[0] * second

    hidden = torch.tanh(x.double() @ weight(0).T + state["0.bias"])
    head = weight(2) + (state["2.correction"] if correction else 0)
    return hidden @ head.T + state["2.bias"] + state["2.label_prior"]


def equal(got, expected, limit=1e-5):
    torch.testing.assert_close(got.double(), expected, rtol=limit, atol=limit)


@pytest.fixture(params=[False, True], ids=["factorised", "dense"])
def model(request):
    return scattered(build(dense_head=request.param))


class TestWithLabelPrior(LayerContract):
    """What every kind of layer must do; the label prior is private under every method."""

    dense_class = nn.Linear
    options = {"label_prior": True}

    def cases(self):
        return [(nn.Linear(96, 160), torch.randn(5, 96)), (nn.Linear(300, 70), torch.randn(2, 300))]

    def test_forward_and_gradients_equal_brute_force(self, method):
        """The prior shifts the output and has no gradient; all others have the formula's."""
        for dense, converted, (x,) in self.converted(method):
            converted.double()
            layer = converted.layer
            assert isinstance(layer, PersonalLinear)
            probe = torch.randn(x.shape[0], dense.out_features, dtype=torch.float64)
            converted(x.double()).backward(probe)
            leaves = {k: v.detach().clone().requires_grad_() for k, v in layer.named_parameters()}
            w = [
                torch.einsum("or,ir->oi", leaves[f"x{i}"], leaves[f"y{i}"])
                for i in range(1, 2 if method == "lowrank" else 3)
            ]
            composed = w[0]
            if method != "lowrank":
                composed = composed * (w[1] + (method == "pfedpara"))
            expected = x.double() @ (composed * layer.plans["weight"].scale).T
            expected = expected + leaves["bias"] + leaves["label_prior"]
            torch.testing.assert_close(converted(x.double()), expected, rtol=1e-9, atol=1e-9)
            expected.backward(probe)
            assert layer.label_prior.grad is None
            for name, leaf in leaves.items():
                if name != "label_prior":
                    grad = layer.get_parameter(name).grad
                    torch.testing.assert_close(grad, leaf.grad, rtol=1e-8, atol=1e-8, msg=name)

    def test_residual_form_equals_brute_force(self, method):
        """The prior shifts the output of the frozen weight and its update, and has no gradient."""
        for dense, converted, (x,) in self.converted(method, base="frozen"):
            converted.double()
            layer = converted.layer
            factors = {k: v.detach().clone() for k, v in layer.factors("weight").items()}
            weight = reference_weight(layer, "weight", factors, dense.weight.detach().double())
            expected = x.double() @ weight.T + layer.bias + layer.label_prior
            torch.testing.assert_close(converted(x.double()), expected, rtol=1e-9, atol=1e-9)
            converted(x.double()).sum().backward()
            assert layer.label_prior.grad is layer.weight_base.grad is None
            assert all(factor.grad is not None for factor in layer.factors("weight").values())

    def test_private_part_at_zero_is_the_shared_model(self, method):
        """Without private state a client computes what the shared state gives."""
        for dense, converted, (x,) in self.converted(method):
            spec, shared = ModelSpec.of(converted), fedpara.split(converted).shared
            assert ("layer.x2" in spec.private_keys) == (method == "pfedpara")
            assert "layer.label_prior" in spec.private_keys
            converted.load_state_dict({**shared, **spec.initial_private()}, strict=True)
            plain = type(converted)(copy.deepcopy(dense))
            plain.load_state_dict(spec.dense_state(shared), strict=True)
            torch.testing.assert_close(plain(x), converted(x), rtol=1e-4, atol=1e-4)

    def test_a_step_moves_every_shared_factor(self, method):
        """Everything but the prior, and what stands behind a zero factor."""
        for _, converted, (x,) in self.converted(method):
            before = {k: p.detach().clone() for k, p in converted.named_parameters()}
            converted(x).square().mean().backward()
            torch.optim.AdamW(converted.parameters(), lr=0.1).step()
            still = {k for k, p in converted.named_parameters() if torch.equal(p, before[k])}
            assert still == {"layer.label_prior"}


def test_only_the_head_is_replaced_and_the_private_parts_start_at_zero():
    for dense_head in (False, True):
        fresh = build(dense_head=dense_head)
        assert type(fresh[2]) is PersonalLinear
        assert type(fresh[0]) is not PersonalLinear
        assert not fresh[2].correction.any()
        assert not fresh[2].label_prior.any()
        assert fresh[2].correction.shape == (CLASSES, 96)
        assert not list(fresh.buffers())
        assert fresh[2].correction.requires_grad
        assert not fresh[2].label_prior.requires_grad
        assert bool(fresh[2].plans) != dense_head


def test_a_dense_head_keeps_its_weight_and_its_place_in_the_state():
    torch.manual_seed(0)
    plain = net()
    fresh = build(dense_head=True)  # draws the same dense weights first
    assert torch.equal(fresh[2].weight, plain[2].weight)
    names = [name for name in fresh.state_dict() if name.startswith("2.")]
    assert names == ["2.weight", "2.bias", "2.correction", "2.label_prior"]


def test_without_a_part_the_layer_has_only_the_other():
    only_prior = build(private_head=False)
    assert "2.correction" not in only_prior.state_dict()
    only_head = build(label_prior=False)
    assert "2.label_prior" not in only_head.state_dict()
    assert not only_head[2].correction.any()
    with torch.no_grad():
        only_head[2].correction.fill_(1.0)
    hidden = only_head[1](only_head[0](inputs()))
    gap = only_head(inputs()) - hidden @ only_head[2].weight.T - only_head[2].bias
    torch.testing.assert_close(gap, hidden.sum(1, keepdim=True).expand(-1, CLASSES))


def test_names_of_the_state_are_attributes_with_the_very_parameters(model):
    """Code that walks by names, or writes into a layer's parameter, must not meet a temporary."""
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter


def test_a_head_without_bias_can_be_corrected():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 8, bias=False))
    model = fedpara.convert(dense, method="pfedpara", private_head=True, schedule="decoupled")
    with torch.no_grad():
        model[1].correction.normal_()
    model.eval()
    plain = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 8, bias=False))
    plain.load_state_dict(fedpara.to_dense(model).state_dict(), strict=True)
    torch.testing.assert_close(plain(inputs()), model(inputs()), rtol=1e-4, atol=1e-5)


# Phases


def test_output_in_evaluation_has_everything(model):
    equal(model.eval()(inputs()), formula(model, inputs()))


def test_private_steps_see_everything(model):
    assert model.training
    equal(model(inputs()), formula(model, inputs()))


def test_shared_steps_see_the_prior_and_not_the_correction(model):
    model[2].progress.private_steps = 0
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    equal(model(inputs()), formula(model, inputs(), factors="shared", correction=False))
    equal(model.eval()(inputs()), formula(model, inputs()))


def train(model, optimizer, steps):
    """What each step moved."""
    labels = torch.arange(5) % CLASSES
    for _ in range(steps):
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        optimizer.zero_grad()
        cross_entropy(model(inputs()), labels).backward()
        optimizer.step()
        yield {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_private_steps_train_the_correction_and_shared_steps_leave_it(model, optimizer):
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=0.05, weight_decay=0.1, **options)
    start_round(model)
    model[2].progress.private_steps = 3
    private = {k for k in model.state_dict() if k.endswith(("x2", "y2", "correction"))}
    shared = set(model.state_dict()) - private - {"2.label_prior"}
    moved = list(train(model, opt, 6))
    assert moved[:3] == [private] * 3
    assert moved[3:] == [shared] * 3


def test_shared_steps_have_the_gradients_of_the_shared_model(model):
    """The shared trajectory does not depend on the private part, whatever that holds."""
    model[2].progress.private_steps = 0
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (other[0], other[2]):
            for name, parameter in layer.named_parameters():
                if name in ("x2", "y2", "correction"):
                    parameter.normal_(std=3.0)
    for one in (model, other):
        list(train(one, torch.optim.SGD(one.parameters(), lr=0.1), 3))
    mine, theirs = fedpara.split(model).shared, fedpara.split(other).shared
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_the_gradient_of_the_correction_is_that_of_a_weight():
    model = scattered(build(dense_head=True)).double()
    x, labels = inputs().double(), torch.arange(5)
    cross_entropy(model(x), labels).backward()
    hidden = torch.tanh(model[0](x)).detach()
    gap = torch.softmax(formula(model, x), 1)
    gap[torch.arange(5), labels] -= 1
    torch.testing.assert_close(model[2].correction.grad, gap.T @ hidden / 5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_shrinks_the_correction_as_the_optimizer_says(model, optimizer):
    """It is no factor: nothing is taken back."""
    before = model[2].correction.detach().clone()
    opt = optimizer(model.parameters(), lr=0.1, weight_decay=0.2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    opt.step()
    torch.testing.assert_close(model[2].correction, before * (1 - 0.1 * 0.2))


# Export


def test_the_unmodified_model_loads_the_folded_weights(model):
    back = fedpara.to_dense(model)
    assert type(back[2]) is nn.Linear
    assert set(vars(back[2])) == set(vars(nn.Linear(2, 2)))
    plain = net()
    plain.load_state_dict(back.state_dict(), strict=True)
    assert list(plain.state_dict()) == list(back.state_dict())
    equal(plain(inputs()), formula(model, inputs()))
    assert all(p.requires_grad for p in back.parameters())
    assert not any(p is q for p in back.parameters() for q in model.parameters())


def test_the_export_is_the_same_in_every_phase(model):
    expected = fedpara.to_dense(model).state_dict()
    model[2].progress.private_steps = 0
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    got = fedpara.to_dense(model).state_dict()
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_nan_in_a_private_part_is_not_exported(model):
    with torch.no_grad():
        model[2].correction[0, 0] = float("nan")
    with pytest.raises(fedpara.ConversionError, match=r"layer '2'.*NaN"):
        fedpara.to_dense(model)


# What torch does with modules


def test_copies_compute_and_train_alike(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        cloudpickle.loads(cloudpickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ]
    moved = list(train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2))
    for other in copies:
        assert list(train(other, torch.optim.SGD(other.parameters(), lr=0.1), 2)) == moved
        torch.testing.assert_close(other(inputs()), model(inputs()))


def test_functional_call_uses_the_given_private_parts(model):
    state = {
        k: 0.5 * v if k in ("2.correction", "2.label_prior") else v
        for k, v in model.state_dict().items()
    }
    got = functional_call(model, state, inputs())
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    equal(got, formula(other, inputs()))


def test_export_program(model):
    program = torch.export.export(model.eval(), (inputs(),))
    equal(program.module()(inputs()), formula(model, inputs()))


@pytest.mark.compiler
def test_compile(model):
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True)(inputs()), model(inputs()), rtol=1e-4, atol=1e-5
    )


def test_moves_to_other_dtypes_and_stays_exact_in_double(model):
    assert {p.dtype for p in copy.deepcopy(model).bfloat16().parameters()} == {torch.bfloat16}
    double = copy.deepcopy(model).double()
    equal(double(inputs().double()), formula(double, inputs()), 1e-12)


def test_a_frozen_head_stays_frozen():
    torch.manual_seed(0)
    dense = net()
    dense[2].requires_grad_(False)
    model = fedpara.convert(dense, method="pfedpara", private_head=True, schedule="decoupled")
    assert not any(p.requires_grad for p in model[2].parameters())


def test_reset_draws_the_weight_and_clears_the_correction(model):
    prior, weight = model[2].label_prior.clone(), model[2].weight.detach().clone()
    model[2].reset_parameters()
    assert not model[2].correction.any()
    assert torch.equal(model[2].label_prior, prior)
    fresh = model[2].weight.detach()
    assert (fresh - weight).abs().mean() > 0.01
    plan = model[2].plans.get("weight")
    expected = plan.variance if plan else 1 / (3 * 96)
    assert fresh.var().item() == pytest.approx(expected, rel=0.1)


def test_text_of_the_layer_names_its_private_parts(model):
    assert "out_features=40" in repr(model[2])
    assert "correction, label_prior" in repr(model[2])
