"""K of factors as they are: how far a training step moves the weight that they compose.

K = |J|² / (m n ...), where J is the Jacobian of the composed weight by all shared factors: what a
step of plain gradient descent moves W along -dL/dW, averaged over all gradients, dense = 1. For
fresh factors it is the plan's (`fedpara_plugins.factors.planning.stated_speed`); for factors that
were fitted to a weight it follows from their values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod, sqrt

import torch
from torch import Tensor

from fedpara_plugins.factors.compose import operand
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.planning import stated_speed
from fedpara_plugins.factors.seeded_gain import BLOCK_ENTRIES

__all__ = ["reached_speed", "slowest_speed", "with_stated_speed"]


def reached_speed(plan: WeightPlan, factors: Mapping[str, Tensor]) -> float:
    """Return K of a weight's shared factors as they are."""
    return sum(_shares(plan, factors).values())


def slowest_speed(plan: WeightPlan, factors: Mapping[str, Tensor]) -> float:
    """Return the smallest K that `with_stated_speed` can give these factors."""
    shares, (x, y) = _shares(plan, factors), _leading(plan)
    return sum(shares.values()) - shares[x] - shares[y] + 2 * sqrt(shares[x] * shares[y])


def with_stated_speed(plan: WeightPlan, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return factors that compose the same weight and have the K of the plan, if there are any.

    X of the first shared operand is divided by a number, and Y multiplied by it. With the shares
    k_x, k_y of the two in K, and k of all others, K(g) = g² k_x + k_y / g² + k, which has a
    solution unless K is smaller than `slowest_speed`. In that case the factors stay as they are.
    """
    shares, (x, y) = _shares(plan, factors), _leading(plan)
    wanted = stated_speed(plan) - (sum(shares.values()) - shares[x] - shares[y])
    inside = wanted * wanted - 4 * shares[x] * shares[y]
    if wanted <= 0 or inside < 0 or shares[x] <= 0:
        return dict(factors)
    gain = sqrt((wanted + sqrt(inside)) / (2 * shares[x]))
    return {**factors, x: factors[x] / gain, y: factors[y] * gain}


def _leading(plan: WeightPlan) -> tuple[str, str]:
    """Return the names of X and Y of the first shared operand."""
    first = next(i for i in range(plan.method.operands) if i not in plan.method.private) + 1
    return f"x{first}", f"y{first}"


def _shares(plan: WeightPlan, factors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the share of each shared factor in K, summed over blocks of rows."""
    # Gradients are recorded here whatever mode the caller is in.
    with torch.inference_mode(False), torch.enable_grad():
        whole = {n: f.detach().to("cpu", torch.float64).clone() for n, f in factors.items()}
        rows = max(1, BLOCK_ENTRIES // prod(plan.shape[1:]))
        sums = {name: 0.0 for name in plan.factor_names if name not in plan.private_names}
        for start in range(0, plan.shape[0], rows):
            part = {n: f[start : start + rows] if n[0] == "x" else f for n, f in whole.items()}
            for name, share in _block_shares(plan, part):
                sums[name] += share
    return {name: value / prod(plan.shape) for name, value in sums.items()}


def _block_shares(plan: WeightPlan, factors: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Yield each shared factor's sum of squared derivatives of these rows."""
    inner, parts = [], []
    for i, gain in enumerate(plan.gains):
        x, y, t = (factors.get(f"{part}{i + 1}") for part in "xyt")
        assert x is not None
        assert y is not None
        parts.append((x * gain, y, t, gain))
        inner.append(operand(x * gain, y, t).requires_grad_())
    passed = [torch.tanh(value) for value in inner] if plan.tanh else inner
    total = plan.method.combine(passed).sum() * plan.outer  # elementwise, so this gives them all
    slopes = torch.autograd.grad(total, inner, allow_unused=True)
    for i, (slope, (x, y, t, gain)) in enumerate(zip(slopes, parts, strict=True)):
        if i in plan.method.private or slope is None:
            continue
        square = slope.square()  # (rows, n, k1, ...)
        shape = (-1, y.shape[0], *[1] * len(plan.shape[2:]))
        squared_x, squared_y = x.square().sum(1), y.square().sum(1)
        if t is None:
            yield f"x{i + 1}", gain**2 * float((square * squared_y.view(shape)).sum())
            yield f"y{i + 1}", float((square.flatten(1).sum(1) * squared_x).sum())
            continue
        right = torch.einsum("pq...,iq->pi...", t, y).square().sum(0)  # (n, k1, ...)
        left = torch.einsum("op,pq...->oq...", x, t).square().sum(1)  # (rows, k1, ...)
        yield f"x{i + 1}", gain**2 * float((square * right).sum())
        yield f"y{i + 1}", float((square.sum(1) * left).sum())
        both = squared_x.view(-1, 1) * squared_y  # (rows, n)
        yield f"t{i + 1}", float((square.flatten(2).sum(2) * both).sum())
