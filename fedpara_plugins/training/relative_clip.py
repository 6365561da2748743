"""The bound on a step of each factor, relative to the factor's own norm."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from math import prod, sqrt
from operator import is_

import torch
from torch import Tensor

from fedpara_plugins.factors.planning import usual_deviation
from fedpara_plugins.layers.base import FactorisedLayer
from fedpara_plugins.training.held_models import HeldModel
from fedpara_plugins.training.real_steps import Step

__all__ = ["clip_relatively", "share_of"]

_Limit = tuple[str, str, float, float]
_Plans = tuple[object, ...]
_limits: weakref.WeakKeyDictionary[FactorisedLayer, tuple[_Plans, list[_Limit]]]
_limits = weakref.WeakKeyDictionary()
"""For each layer its plans then, and for each factor weight, name, share and smallest norm."""


def share_of(clip: str) -> float | None:
    """Return the share of a text such as ``relative:0.03``; None for the method's own."""
    share = clip.partition(":")[2]
    return float(share) if share else None


def clip_relatively(step: Step, model: HeldModel, share: float | None) -> Tensor | None:
    """Scale down the gradient g of each factor f for which lr |g| > c max(|f|, usual norm).

    Norms are Frobenius norms, lr is that of the factor's parameter group, and the usual norm is
    that of standard deviations `usual_deviation`. Other parameters are left alone.

    Args:
        step: a step whose gradients are ready, and may be scaled.
        model: the model that they are of.
        share: c; None for that of each weight's method.

    Returns:
        The norm of the gradient over all parameters of the optimizer before that; None if it has no
        gradient.
    """
    own = {id(p): p.grad for p in model.own if p.grad is not None}
    if not own:
        return None
    step.unscale()
    norms = {key: _norm(gradient) for key, gradient in own.items()}
    rates = _rates(step)
    for factor, own_share, least in _factors(model.layers, share):
        gradient = own.pop(id(factor), None)
        if gradient is None:
            continue
        length = rates[id(factor)] * norms[id(factor)]
        _scale_down(gradient, length, factor, own_share, least)
    every = list(norms.values())
    whole: Tensor = torch.linalg.vector_norm(torch.stack([n.to(every[0].device) for n in every]))
    return whole


def _scale_down(
    gradient: Tensor, length: Tensor, factor: Tensor, share: float, least: float
) -> None:
    if length.device.type != "cpu":  # without waiting for the device
        bound = share * _norm(factor).clamp(min=least)
        gradient.mul_((bound / length).clamp(max=1.0))
        return
    found = float(length)
    if found > share * least:
        limit = share * max(float(_norm(factor)), least)
        if found > limit:
            gradient.mul_(limit / found)


def _rates(step: Step) -> dict[int, float | Tensor]:
    """Return each parameter's learning rate, by id; 1 where its group has none."""
    rates = {}
    for group in step.optimizer.param_groups:
        lr = group.get("lr")
        rates.update(dict.fromkeys(map(id, group["params"]), 1.0 if lr is None else lr))
    return rates


def _factors(
    layers: Iterable[FactorisedLayer], share: float | None
) -> Iterator[tuple[Tensor, float, float]]:
    """Yield each factor with its share c and its usual norm."""
    for layer in layers:
        plans = tuple(layer.plans.values())
        known = _limits.get(layer)
        if known is None or len(known[0]) != len(plans) or not all(map(is_, known[0], plans)):
            known = _limits[layer] = plans, list(_limits_of(layer))
        factors = {weight: layer.factors(weight) for weight in layer.plans}
        for weight, name, of_method, least in known[1]:
            yield factors[weight][name], share or of_method, least


def _limits_of(layer: FactorisedLayer) -> Iterator[_Limit]:
    for weight, plan in layer.plans.items():
        for name in plan.factor_names:
            least = usual_deviation(plan, name) * sqrt(prod(plan.factor_shape(name)))
            yield weight, name, plan.method.clip, least


def _norm(values: Tensor) -> Tensor:
    """Return the Frobenius norm; 16-bit values are summed in float32."""
    values = values.coalesce().values() if values.is_sparse else values
    dtype = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else None
    norm: Tensor = torch.linalg.vector_norm(values.detach(), dtype=dtype)
    return norm
