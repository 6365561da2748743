"""The parts of a training step with factors: the dense step, and parts for each weight.

`fedpara_plugins.cli.step_cost` times the parts and adds them up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.layers.base import FactorisedLayer

__all__ = ["Call", "TimedPart", "composition", "record_uses", "timed_parts", "training_step"]

Call = Callable[[], object]

TimedPart = tuple[str, float, Call]
"""A unique name, the factor of its time in what a weight adds, and the call to time."""


@dataclass
class LayerUse:
    """How one forward pass uses a layer.

    Attributes:
        calls: the tensors of each call, for a layer that may skip composing its weight.
        composed: how often each weight is composed.
    """

    calls: list[tuple[Tensor, ...]] = field(default_factory=list)
    composed: Counter[str] = field(default_factory=Counter)


def record_uses(
    converted: nn.Module, layers: Mapping[str, FactorisedLayer], inputs: Sequence[Tensor]
) -> dict[str, LayerUse]:
    """Run one forward pass, and return how it uses each layer.

    A watcher of weights makes every layer compose them, so layers that may skip that are recorded
    by their calls.
    """
    uses: dict[str, LayerUse] = {}
    handles = []
    for name, layer in layers.items():
        use = uses[name] = LayerUse()

        def given(
            _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], use: LayerUse = use
        ) -> None:
            tensors = [x for x in (*args, *named.values()) if isinstance(x, Tensor)]
            use.calls.append(tuple(x.detach().requires_grad_(x.requires_grad) for x in tensors))

        def composed(weight: str, _: Tensor, use: LayerUse = use) -> None:
            use.composed[weight] += 1

        if layer.may_skip_composing:
            handles.append(layer.register_forward_pre_hook(given, with_kwargs=True))
        layer.on_composed = composed
    converted(*inputs)
    for handle in handles:
        handle.remove()
    for layer in layers.values():
        del layer.on_composed
    return uses


def training_step(model: nn.Module, inputs: Sequence[Tensor]) -> Call:
    """Return a call that makes one training step of SGD.

    The loss is the sum of squares of all floating-point outputs. The call raises ConfigError if the
    model fails on these inputs.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # The step is so small that the model does not change.
    optimizer = torch.optim.SGD(trained, lr=1e-12) if trained else None

    def step() -> None:
        try:
            if optimizer is not None:
                optimizer.zero_grad()
            losses = [x.square().sum() for x in _floating(model(*inputs)) if x.requires_grad]
            if trained and not losses:
                raise ConfigError(
                    "a training step of the model cannot be timed: its output holds no tensor with "
                    "a gradient, in tuples, lists, dictionaries or dataclasses: let forward return "
                    "the tensors that the loss is computed from"
                )
            if losses:
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        except ConfigError:
            raise
        except Exception as error:  # the user's own code may raise anything
            raise _refused(error, inputs) from error
        if optimizer is not None:
            optimizer.step()

    return step


def timed_parts(
    name: str, layer: FactorisedLayer, dense: nn.Module, use: LayerUse
) -> Iterator[tuple[str, list[TimedPart]]]:
    """Yield for each weight of a layer its name in the model and the parts of what it adds.

    Args:
        name: the layer's name in the model.
        layer: the factorised layer.
        dense: the layer that it replaces.
        use: from `record_uses`.
    """
    if use.calls:
        key = f"{name}.weight" if name else "weight"
        yield (
            key,
            [
                (f"{key} with factors", 1.0, _calls(layer, use)),
                (f"{key} dense", -1.0, _calls(dense, use)),
                (f"{key} step of factors", 1.0, _sgd(layer)),
                (f"{key} step", -1.0, _sgd(dense)),
            ],
        )
        return
    for weight, count in use.composed.items():
        key = f"{name}.{weight}" if name else weight
        own = dense.get_parameter(weight)
        yield (
            key,
            [
                (key, float(count), composition(layer, weight)),
                (f"{key} step of factors", 1.0, _sgd_of(list(layer.factors(weight).values()))),
                (f"{key} step", -1.0, _sgd_of([own])),
            ],
        )


def composition(layer: FactorisedLayer, weight: str) -> Call:
    """Return a call that composes a weight and returns the gradients of its factors."""
    factors = [f for f in layer.factors(weight).values() if f.requires_grad]
    with torch.no_grad():
        gradient = torch.randn_like(layer.composed_weight(weight))

    def run() -> object:
        value = layer.composed_weight(weight)
        return torch.autograd.grad(value, factors, gradient) if factors else value

    return run


def _calls(layer: nn.Module, use: LayerUse) -> Call:
    """Return a call that repeats all calls of a layer, forward and backward."""
    leaves = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        probes = [torch.randn_like(layer(*given)) for given in use.calls]

    def run() -> None:
        for given, probe in zip(use.calls, probes, strict=True):
            wanted = [*leaves, *(x for x in given if x.requires_grad)]
            output = layer(*given)
            if wanted:
                torch.autograd.grad(output, wanted, probe)

    return run


def _sgd(layer: nn.Module) -> Call:
    return _sgd_of([p for p in layer.parameters() if p.requires_grad])


def _sgd_of(tensors: Sequence[Tensor]) -> Call:
    """Return a call that makes a step of plain SGD on copies of tensors."""
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    if not copies:
        return lambda: None
    for own in copies:
        own.grad = torch.zeros_like(own)
    return torch.optim.SGD(copies, lr=1e-12).step


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _floating(value)
    elif is_dataclass(output) and not isinstance(output, type):
        yield from _floating(vars(output))


def _refused(error: Exception, inputs: Sequence[Tensor]) -> ConfigError:
    shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
    return ConfigError(
        f"a training step of the model fails on inputs of shape {shapes}: "
        f"{type(error).__name__}: {error}"
    )
