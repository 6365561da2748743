"""Brute-force references for factorised layers: explicit sums, not the library's composition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers import FactorisedLayer

__all__ = ["OneLayer", "factorised_weights", "reference_state", "reference_weight"]


class OneLayer(nn.Module):
    """A model of one layer, named ``layer``."""

    layer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Any:
        """Return the layer's output, or the first part of it."""
        output = self.layer(*inputs)
        return output[0] if isinstance(output, tuple) else output


def reference_weight(
    layer: FactorisedLayer,
    weight: str,
    factors: dict[str, Tensor],
    base: Tensor | None = None,
) -> Tensor:
    """Compose a weight by explicit sums over the ranks.

    Args:
        layer: that the weight belongs to.
        weight: its name in the layer.
        factors: by name.
        base: W0 of the residual form.
    """
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
    if plan.residual:
        products["pfedpara"] = lambda w: w[0] + w[1]
    value: Tensor = products[plan.method.name](operands).reshape(plan.shape)
    value = (bound if plan.tanh else plan.scale) * value
    return value if base is None else base + value


def factorised_weights(model: nn.Module) -> Iterator[tuple[str, FactorisedLayer, str, WeightPlan]]:
    """Yield every factorised weight: its layer's path, the layer, its own name and its plan."""
    for path, layer in model.named_modules():
        if isinstance(layer, FactorisedLayer):
            for weight, plan in layer.plans.items():
                yield path, layer, weight, plan


def reference_state(model: OneLayer, copies: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the dense model's state, with brute-force weights in place of the factors."""
    state = dict(copies)
    for path, layer, weight, plan in factorised_weights(model):
        keys = {name: f"{path}.{layer.factor_key(weight, name)}" for name in plan.factor_names}
        factors = {name: state.pop(key) for name, key in keys.items()}
        base = state.pop(f"{path}.{weight}_base") if plan.residual else None
        state[f"{path}.{weight}"] = reference_weight(layer, weight, factors, base)
    return state
