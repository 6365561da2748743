"""The clip relative to each factor's norm, written out.

Nothing of the plugin computes here. Of a converted model only names and shapes of factors are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod, sqrt

import torch
from torch import Tensor, nn

__all__ = ["SHARES", "clipped", "he", "torchs", "usual_norms"]

SHARES = {"lowrank": 0.03, "fedpara": 0.03, "pfedpara": 0.1}
"""The share of each method."""


def torchs(fan_in: int) -> float:
    """Return the variance that torch gives a linear layer or a convolution."""
    return 1 / (3 * fan_in)


def he(fan_in: int) -> float:
    """Return He's variance."""
    return 2 / fan_in


def usual_norms(
    model: nn.Module, method: str, variance_of: Callable[[int], float] = torchs
) -> dict[str, float]:
    """Return the norm that each factor has where K is 1, by name.

    With v the weight's variance, each of F shared factors has the variance F v. The private operand
    X Yᵀ is multiplied by W1, of variance v, so that Y of variance 1 / (v R) makes K = v R var(Y); a
    core T lies between X and Y, and then both have 1 / (R sqrt v). The factor of zeros has v.

    Args:
        model: converted, with linear layers and convolutions.
        method: of all its factorised layers.
        variance_of: maps the fan-in to v.
    """
    found = {}
    for place, layer in model.named_modules():
        if not hasattr(layer, "x1"):
            continue
        shape = tuple(layer.weight.shape)
        variance, rank, kernel = variance_of(prod(shape[1:])), layer.x1.shape[1], len(shape) > 2
        for name, factor in layer.named_parameters(recurse=False):
            if name == "bias":
                continue
            square = {"lowrank": 1, "fedpara": 2, "pfedpara": 1}[method] * (3 if kernel else 2)
            square *= variance
            if method == "pfedpara" and name.endswith("2"):
                square = 1 / (rank * sqrt(variance)) if kernel else 1 / (variance * rank)
                if name == ("t2" if kernel else "x2"):
                    square = variance
            found[f"{place}.{name}" if place else name] = sqrt(square * factor.numel())
    return found


def clipped(
    name: str,
    value: Tensor,
    gradient: Tensor,
    *,
    rate: float,
    share: float,
    norms: Mapping[str, float],
) -> Tensor:
    """Return a gradient as a step may use it.

    Args:
        name: of the parameter.
        value: the parameter now.
        gradient: of the loss.
        rate: the learning rate.
        share: c.
        norms: of `usual_norms`; parameters that are not among them are no factors.
    """
    if name not in norms:
        return gradient
    with torch.no_grad():
        bound = share * max(float(value.square().sum() ** 0.5), norms[name])
        length = rate * float(gradient.square().sum() ** 0.5)
    return gradient * (bound / length) if length > bound else gradient
