"""What every kind of factorised layer must do, as a pytest class to inherit.

    class TestLinear(LayerContract):
        dense_class = nn.Linear

        def cases(self):
            return [(nn.Linear(96, 80), torch.randn(5, 96))]

The references are brute force: plain einsums in float64, written without the library's own
composition. Needs pytest; import it from tests only.
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

from fedpara_plugins import ModelSpec, convert, report, split, to_dense
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers import FactorisedLayer

__all__ = ["LayerContract"]

METHODS = ("lowrank", "fedpara", "pfedpara")

Case = tuple[nn.Module, Any]


class Holder(nn.Module):
    """A model of one layer: its name is ``layer``."""

    layer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Any:
        """What the layer gives, or the first part of it."""
        output = self.layer(*inputs)
        return output[0] if isinstance(output, tuple) else output


def reference_weight(layer: FactorisedLayer, weight: str, factors: dict[str, Tensor]) -> Tensor:
    """The composed weight by explicit sums over the ranks."""
    plan = layer.plans[weight]
    operands = []
    for i in range(1, plan.method.operands + 1):
        x, y, t = factors[f"x{i}"], factors[f"y{i}"], factors.get(f"t{i}")
        if t is None:
            operands.append(torch.einsum("or,ir->oi", x, y))
        else:
            operands.append(torch.einsum("pq...,op,iq->oi...", t, x, y))
    if plan.tanh:
        shared = plan.method.operands - len(plan.method.private)
        bound = max(1.0, 4 * plan.variance**0.5)
        gain = (plan.scale / bound) ** (1 / shared)
        operands = [
            torch.tanh(w if i in plan.method.private else gain * w) for i, w in enumerate(operands)
        ]
    products = {
        "lowrank": lambda w: w[0],
        "fedpara": lambda w: w[0] * w[1],
        "pfedpara": lambda w: w[0] * (w[1] + torch.ones_like(w[1])),
    }
    weight_value: Tensor = products[plan.method.name](operands)
    return (bound if plan.tanh else plan.scale) * weight_value.reshape(plan.shape)


@pytest.mark.parametrize("method", METHODS)
class LayerContract:
    """Inherit, set ``dense_class`` and override `cases`."""

    dense_class: type[nn.Module]
    gamma = 0.3
    options: dict[str, Any] = {}  # noqa: RUF012
    tolerance = 2e-5

    def cases(self) -> list[Case]:
        """Dense layers, each with one sample input (or a tuple of inputs)."""
        raise NotImplementedError

    def converted(self, method: str) -> Iterator[tuple[nn.Module, Holder, tuple[Any, ...]]]:
        """Every case: the dense layer as it was, the converted model, the inputs."""
        torch.manual_seed(0)
        for dense, inputs in self.cases():
            model = convert(
                Holder(copy.deepcopy(dense)), method=method, gamma=self.gamma, **self.options
            )
            _scatter(model)
            yield dense, model, inputs if isinstance(inputs, tuple) else (inputs,)

    def test_is_an_ordinary_layer(self, method: str) -> None:
        """Class, text, state without buffers of its own, device and dtype moves."""
        for dense, model, _ in self.converted(method):
            assert isinstance(model.layer, self.dense_class)
            assert isinstance(model.layer, FactorisedLayer)
            assert method in repr(model.layer)
            assert len(list(model.layer.buffers())) == len(list(dense.buffers()))
            assert {p.dtype for p in model.bfloat16().parameters()} == {torch.bfloat16}

    def test_saves_parameters(self, method: str) -> None:
        """Fewer parameters than dense, as many as the report says."""
        for dense, model, _ in self.converted(method):
            count = sum(p.numel() for p in model.parameters())
            assert count < sum(p.numel() for p in dense.parameters())
            assert report(model).parameters == count

    def test_forward_and_gradients_equal_brute_force(self, method: str) -> None:
        """Float64: output, and the gradient of every parameter and input, from explicit sums."""
        for dense, model, inputs in self.converted(method):
            model.double()
            inputs = tuple(_double(value) for value in inputs)
            output = model(*inputs)
            probe = torch.randn_like(output)
            leaves = dict(model.named_parameters())
            wanted = torch.autograd.grad((output * probe).sum(), list(leaves.values()))

            copies = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
            plain = Holder(copy.deepcopy(dense)).double()
            state = _reference_state(model, copies)
            expected = torch.func.functional_call(plain, state, inputs)
            grads = torch.autograd.grad((expected * probe).sum(), list(copies.values()))
            torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
            for name, got, want in zip(leaves, wanted, grads, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8, msg=f"{name}")

    def test_to_dense_gives_the_same_outputs(self, method: str) -> None:
        """At random factors: the dense copy, and the plain layer that loads its state strictly."""
        for dense, model, inputs in self.converted(method):
            back = to_dense(model)
            assert type(back.layer) is self.dense_class
            plain = Holder(copy.deepcopy(dense))
            plain.load_state_dict(back.state_dict(), strict=True)
            assert list(plain.state_dict()) == list(back.state_dict())
            expected = model(*inputs)
            limit = self.tolerance * float(expected.detach().abs().max())
            torch.testing.assert_close(back(*inputs), expected, rtol=1e-4, atol=limit)
            torch.testing.assert_close(plain(*inputs), expected, rtol=1e-4, atol=limit)

    def test_dense_state_from_the_spec(self, method: str) -> None:
        """The spec alone, through JSON, turns a state of factors into the same dense state."""
        for _, model, _ in self.converted(method):
            parts = split(model)
            spec = ModelSpec.from_json(ModelSpec.of(model).to_json(), tuple(parts.shared))
            dense = spec.dense_state(model.state_dict())
            expected = to_dense(model).state_dict()
            assert list(dense) == list(expected)
            for name, value in dense.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)

    def test_private_part_at_zero_is_the_shared_model(self, method: str) -> None:
        """A client without private state computes exactly what the shared factors give."""
        for _, model, inputs in self.converted(method):
            spec = ModelSpec.of(model)
            shared = split(model).shared
            model.load_state_dict({**shared, **spec.initial_private()}, strict=True)
            plain = copy.deepcopy(to_dense(model))
            plain.load_state_dict(spec.dense_state(shared), strict=True)
            torch.testing.assert_close(plain(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
            assert bool(spec.private_keys) == (method == "pfedpara")

    def test_survives_copies_after_a_training_step(self, method: str) -> None:
        """deepcopy, pickle and torch.save of the whole model, after forward, backward and step."""
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
        """From a fresh start, every factor but those behind a zero one gets a gradient."""
        torch.manual_seed(0)
        for dense, inputs in self.cases():
            model = convert(
                Holder(copy.deepcopy(dense)), method=method, gamma=self.gamma, **self.options
            )
            before = {k: v.detach().clone() for k, v in model.named_parameters()}
            _train_step(model, inputs if isinstance(inputs, tuple) else (inputs,))
            still = {k for k, v in model.named_parameters() if torch.equal(v, before[k])}
            expected = {
                f"{path}.{layer.factor_key(weight, name)}"
                for path, layer, weight, plan in _weights(model)
                for name in plan.private_names
                if not plan.zero_at_start(name)
            }
            assert still == expected

    def test_composed_variance(self, method: str) -> None:
        """Within 5 % of the variance that the kind of layer has by default."""
        torch.manual_seed(0)
        for dense, _ in self.cases():
            model = convert(
                Holder(copy.deepcopy(dense)), method=method, gamma=self.gamma, **self.options
            )
            for path, layer, weight, plan in _weights(model):
                got = layer.composed_weight(weight).double().var().item()
                plain = Holder(dense).get_submodule(path)
                default = getattr(plain, weight).double().var().item()
                assert got == pytest.approx(plan.variance, rel=0.05)
                assert got == pytest.approx(default, rel=0.15)

    def test_speed(self, method: str) -> None:
        """Per unit of learning rate the weight moves K times as far as dense along the gradient.

        Measured as the slope of <W(step) - W, -G> / |G|² for random gradients G, averaged.
        """
        torch.manual_seed(0)
        for dense, _ in self.cases():
            slopes: dict[str, list[float]] = {}
            for _ in range(8):
                model = convert(
                    Holder(copy.deepcopy(dense)), method=method, gamma=self.gamma, **self.options
                )
                for path, layer, weight, _ in _weights(model):
                    slopes.setdefault(f"{path}.{weight}", []).append(_slope(layer, weight))
            for path, _, weight, plan in _weights(model):
                expected = plan.method.speed + (0.2 if plan.private_names else 0.0)
                measured = slopes[f"{path}.{weight}"]
                mean = sum(measured) / len(measured)
                assert mean == pytest.approx(expected, rel=0.2)


def _scatter(model: nn.Module) -> None:
    """Random, non-degenerate factors, private ones included, of the size that training gives."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("x2", "t2")):
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.02)


def _weights(model: nn.Module) -> Iterator[tuple[str, FactorisedLayer, str, WeightPlan]]:
    """Every factorised weight: its layer's path, the layer, its own name and plan."""
    for path, layer in model.named_modules():
        if isinstance(layer, FactorisedLayer):
            for weight, plan in layer.plans.items():
                yield path, layer, weight, plan


def _reference_state(model: Holder, copies: dict[str, Tensor]) -> dict[str, Tensor]:
    state = dict(copies)
    for path, layer, weight, plan in _weights(model):
        keys = {name: f"{path}.{layer.factor_key(weight, name)}" for name in plan.factor_names}
        factors = {name: state.pop(key) for name, key in keys.items()}
        state[f"{path}.{weight}"] = reference_weight(layer, weight, factors)
    return state


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
    change = (layer.plans[weight].compose(moved) - before).detach()
    return float((change * -gradient).sum() / (step * gradient.square().sum()))


def _double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
