"""The contract of factorised layers, as a pytest class to inherit.

    class TestLinear(LayerContract):
        dense_class = nn.Linear

        def cases(self):
            return [(nn.Linear(96, 80), torch.randn(5, 96))]

The references are those of `brute_force`: plain einsums in float64, written without the library's
own composition. Needs pytest; import it from tests only.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpara_plugins import FedParaConfig, ModelSpec, convert, report, split, to_dense
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.testing.brute_force import OneLayer, factorised_weights, reference_state

__all__ = ["LayerContract"]

METHODS = ("lowrank", "fedpara", "pfedpara")
PRIVATE_SPEED = FedParaConfig().private_speed

Case = tuple[nn.Module, Any]


@pytest.mark.parametrize("method", METHODS)
class LayerContract:
    """Tests of a factorised layer. Inherit, set ``dense_class`` and override `cases`.

    Attributes:
        dense_class: the layer that the factorised one replaces.
        gamma: sets the rank of every case.
        options: further options of `convert`.
        tolerance: of a dense copy's outputs, relative to the largest value.
    """

    dense_class: type[nn.Module]
    gamma = 0.3
    options: dict[str, Any] = {}  # noqa: RUF012
    tolerance = 2e-5

    def cases(self) -> list[Case]:
        """Return dense layers, each with one sample input (or a tuple of inputs)."""
        raise NotImplementedError

    def _converted_copy(self, dense: nn.Module, method: str, **more: Any) -> OneLayer:
        """Convert a copy of a dense layer with this contract's options, and more."""
        options = {**self.options, **more}
        return convert(OneLayer(copy.deepcopy(dense)), method=method, gamma=self.gamma, **options)

    def converted(
        self, method: str, *, scattered: bool = True, **more: Any
    ) -> Iterator[tuple[nn.Module, OneLayer, tuple[Any, ...]]]:
        """Yield for every case the dense layer as it was, the converted model and the inputs."""
        torch.manual_seed(0)
        for dense, inputs in self.cases():
            model = self._converted_copy(dense, method, **more)
            if scattered:
                _scatter(model)
            yield dense, model, inputs if isinstance(inputs, tuple) else (inputs,)

    def test_is_an_ordinary_layer(self, method: str) -> None:
        """Check the class, the text, the absence of own buffers, and moves to another dtype."""
        for dense, model, _ in self.converted(method):
            assert isinstance(model.layer, self.dense_class)
            assert isinstance(model.layer, FactorisedLayer)
            assert method in repr(model.layer)
            assert len(list(model.layer.buffers())) == len(list(dense.buffers()))
            assert {p.dtype for p in model.bfloat16().parameters()} == {torch.bfloat16}

    def test_saves_parameters(self, method: str) -> None:
        """Check that it has fewer parameters than dense, and as many as the report says."""
        for dense, model, _ in self.converted(method):
            count = sum(p.numel() for p in model.parameters())
            assert count < sum(p.numel() for p in dense.parameters())
            assert report(model).parameters == count

    def test_forward_and_gradients_equal_brute_force(self, method: str) -> None:
        """Check the output and every parameter's gradient in float64 against explicit sums."""
        for dense, model, inputs in self.converted(method):
            _check_by_brute_force(dense, model, inputs)

    def test_to_dense_gives_the_same_outputs(self, method: str) -> None:
        """Check the dense copy, and a plain layer that loads its state strictly."""
        for dense, model, inputs in self.converted(method):
            back = to_dense(model)
            assert type(back.layer) is self.dense_class
            plain = OneLayer(copy.deepcopy(dense))
            plain.load_state_dict(back.state_dict(), strict=True)
            assert list(plain.state_dict()) == list(back.state_dict())
            expected = model(*inputs)
            limit = self.tolerance * float(expected.detach().abs().max())
            torch.testing.assert_close(back(*inputs), expected, rtol=1e-4, atol=limit)
            torch.testing.assert_close(plain(*inputs), expected, rtol=1e-4, atol=limit)

    def test_dense_state_from_the_spec(self, method: str) -> None:
        """Check that the spec alone, through JSON, makes the same dense state of factors."""
        for _, model, _ in self.converted(method):
            parts = split(model)
            spec = ModelSpec.from_json(ModelSpec.of(model).to_json(), tuple(parts.shared))
            dense = spec.dense_state(model.state_dict())
            expected = to_dense(model).state_dict()
            assert list(dense) == list(expected)
            for name, value in dense.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)

    def test_private_part_at_zero_is_the_shared_model(self, method: str) -> None:
        """Check that a client without private state computes what the shared factors give."""
        for _, model, inputs in self.converted(method):
            spec = ModelSpec.of(model)
            shared = split(model).shared
            model.load_state_dict({**shared, **spec.initial_private()}, strict=True)
            plain = copy.deepcopy(to_dense(model))
            plain.load_state_dict(spec.dense_state(shared), strict=True)
            torch.testing.assert_close(plain(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
            assert bool(spec.private_keys) == (method == "pfedpara")

    def test_survives_copies_after_a_training_step(self, method: str) -> None:
        """Check deepcopy, pickle and torch.save of the whole model, after a training step."""
        for _, model, inputs in self.converted(method):
            _train_step(model, inputs)
            expected = model(*inputs)
            stream = io.BytesIO()
            torch.save(model, stream)
            stream.seek(0)
            copies = (
                copy.deepcopy(model),
                pickle.loads(pickle.dumps(model)),
                torch.load(stream, weights_only=False),
            )
            for other in copies:
                torch.testing.assert_close(other(*inputs), expected, rtol=1e-5, atol=1e-6)

    def test_a_step_moves_every_shared_factor(self, method: str) -> None:
        """Check that a first step moves every factor but those multiplied by a zero one."""
        torch.manual_seed(0)
        for dense, inputs in self.cases():
            model = self._converted_copy(dense, method)
            before = {k: v.detach().clone() for k, v in model.named_parameters()}
            _train_step(model, inputs if isinstance(inputs, tuple) else (inputs,))
            still = {k for k, v in model.named_parameters() if torch.equal(v, before[k])}
            expected = {
                f"{path}.{layer.factor_key(weight, name)}"
                for path, layer, weight, plan in factorised_weights(model)
                for name in plan.private_names
                if not plan.zero_at_start(name)
            }
            assert still == expected

    def test_composed_variance(self, method: str) -> None:
        """Check the variance: within 5 % of the plan's, and 15 % of the dense layer's."""
        torch.manual_seed(0)
        for dense, _ in self.cases():
            model = self._converted_copy(dense, method, variance="torch")
            for path, layer, weight, plan in factorised_weights(model):
                got = layer.composed_weight(weight).double().var().item()
                plain = OneLayer(dense).get_submodule(path)
                default = getattr(plain, weight).double().var().item()
                assert got == pytest.approx(plan.variance, rel=0.05)
                assert got == pytest.approx(default, rel=0.15)

    # The residual form: the dense weight stays, and factors are an update of it

    def test_residual_form_starts_as_the_dense_layer(self, method: str) -> None:
        """Check that outputs and weights equal the dense layer's, bit for bit."""
        for dense, model, inputs in self.converted(method, scattered=False, base="frozen"):
            plain = OneLayer(copy.deepcopy(dense))
            assert torch.equal(model(*inputs), plain(*inputs))
            back, expected = to_dense(model).state_dict(), plain.state_dict()
            assert list(back) == list(expected)
            assert all(torch.equal(back[name], value) for name, value in expected.items())

    def test_residual_form_equals_brute_force(self, method: str) -> None:
        """Check outputs and gradients in float64; the frozen weight has none."""
        for dense, model, inputs in self.converted(method, base="frozen"):
            for path, layer, weight, _ in factorised_weights(model):
                base = layer.base(weight)
                assert base is layer.get_parameter(f"{weight}_base")
                assert not base.requires_grad
                plain = OneLayer(copy.deepcopy(dense)).get_submodule(path)
                assert torch.equal(base, plain.get_parameter(weight))
            _check_by_brute_force(dense, model, inputs)

    def test_residual_form_survives_training_and_copies(self, method: str) -> None:
        """Check copies after a step, the way back, and that the frozen weight has not moved."""
        for dense, model, inputs in self.converted(method, base="frozen"):
            bases = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("_base")}
            _train_step(model, inputs)
            expected = model(*inputs)
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                torch.testing.assert_close(other(*inputs), expected, rtol=1e-5, atol=1e-6)
            state = model.state_dict()
            assert all(torch.equal(state[name], value) for name, value in bases.items())
            spec = ModelSpec.from_json(ModelSpec.of(model).to_json(), tuple(split(model).shared))
            assert set(spec.base_keys.values()) == bases.keys()
            plain = OneLayer(copy.deepcopy(dense))
            plain.load_state_dict(spec.dense_state(state), strict=True)
            limit = self.tolerance * float(expected.detach().abs().max())
            torch.testing.assert_close(plain(*inputs), expected, rtol=1e-4, atol=limit)
            torch.testing.assert_close(to_dense(model)(*inputs), expected, rtol=1e-4, atol=limit)

    def test_residual_form_trained_on_one_side_averages_exactly(self, method: str) -> None:
        """Check what is trained, that all else is seeded, and the mean of two updates."""
        if self.options.get("tanh"):
            pytest.skip("with tanh no update is linear in its factors")
        torch.manual_seed(0)
        options = {"base": "frozen", "train": "right"}
        for dense, _ in self.cases():
            first = self._converted_copy(dense, method, **options)
            torch.manual_seed(1)
            second = self._converted_copy(dense, method, **options)
            spec = ModelSpec.of(first)
            ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
            factors = {k for w in spec.weights for k in spec.factor_keys(w).values()}
            for name in factors:
                assert torch.equal(ours[name], theirs[name])
                assert ours[name].requires_grad == (name not in spec.fixed_keys)
                if name not in spec.private_keys and ours[name].requires_grad:
                    assert name.endswith("x1")
            with torch.no_grad():
                for model in (ours, theirs):
                    for name in factors - spec.fixed_keys - spec.private_keys:
                        model[name].normal_()
            states = [m.state_dict() for m in (first, second)]
            mean = {k: (v + states[1][k]) / 2 for k, v in states[0].items()}
            dense_states = [spec.dense_state(state) for state in (*states, mean)]
            for weight in spec.weights:
                one, two, of_mean = (state[weight] for state in dense_states)
                torch.testing.assert_close(of_mean, (one + two) / 2, rtol=1e-4, atol=1e-4)

    # Variance and speed

    def test_residual_form_has_the_stated_speed(self, method: str) -> None:
        """Check K at the first step, as `test_speed` does."""
        self._check_speed(method, base="frozen")

    def test_speed(self, method: str) -> None:
        """Check K: the weight's movement along the gradient per learning rate, relative to dense.

        The movement is the slope of <W(step) - W, -G> / |G|², averaged over random gradients G.
        """
        self._check_speed(method)

    def _check_speed(self, method: str, **more: Any) -> None:
        torch.manual_seed(0)
        for dense, _ in self.cases():
            slopes: dict[str, list[float]] = {}
            for _ in range(8):
                model = self._converted_copy(dense, method, init="random", **more)
                for path, layer, weight, _ in factorised_weights(model):
                    slopes.setdefault(f"{path}.{weight}", []).append(_slope(layer, weight))
            for path, _, weight, plan in factorised_weights(model):
                expected = plan.method.speed + (PRIVATE_SPEED if plan.private_names else 0.0)
                measured = slopes[f"{path}.{weight}"]
                mean = sum(measured) / len(measured)
                assert mean == pytest.approx(expected, rel=0.2)


def _scatter(model: nn.Module) -> None:
    """Make factors random and non-degenerate, private ones too, of the size after training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("x2", "t2")):
                parameter.normal_(std=0.3)
            elif not name.endswith("_base"):
                parameter.add_(torch.randn_like(parameter) * 0.02)


def _check_by_brute_force(dense: nn.Module, model: OneLayer, inputs: tuple[Any, ...]) -> None:
    model.double()
    inputs = tuple(_double(value) for value in inputs)
    output = model(*inputs)
    probe = torch.randn_like(output)
    leaves = dict(model.named_parameters())
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad((output * probe).sum(), list(trained.values()))

    copies = {k: v.detach().clone().requires_grad_(k in trained) for k, v in leaves.items()}
    plain = OneLayer(copy.deepcopy(dense)).double()
    state = reference_state(model, copies)
    expected = torch.func.functional_call(plain, state, inputs)
    grads = torch.autograd.grad((expected * probe).sum(), [copies[name] for name in trained])
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for name, got, want in zip(trained, found, grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8, msg=f"{name}")


def _train_step(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss: Callable[[], Tensor] = lambda: model(*inputs).square().mean()  # noqa: E731
    loss().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _slope(layer: FactorisedLayer, weight: str) -> float:
    step = 1e-4
    before = layer.composed_weight(weight)
    gradient = torch.randn_like(before)
    factors = layer.factors(weight)
    grads = torch.autograd.grad((before * gradient).sum(), list(factors.values()))
    moved = {k: (f - step * g).detach() for (k, f), g in zip(factors.items(), grads, strict=True)}
    change = (layer.compose_from(weight, moved) - before).detach()
    return float((change * -gradient).sum() / (step * gradient.square().sum()))


def _double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
