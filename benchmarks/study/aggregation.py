"""What a server makes of its clients' factors.

The mean of factors composes another weight than the mean of the clients' weights: with X_i and Y_i
of client i, mean(X_i) mean(Y_i)ᵀ is not mean(X_i Y_iᵀ). The rules:

- ``factors``: FedAvg's mean of every tensor, as any strategy computes it.
- ``composed``: the factors whose composed weights come closest to the mean of the clients' composed
  weights. For ``lowrank`` that is the truncated SVD of the mean; the search starts at the mean of
  factors, so it keeps their balance of X and Y, on which the speed of training depends.
- ``product``: the mean of factors, and in W0 what it misses of the mean of weights: exact. W0 is
  then a dense tensor that travels to the clients, so such runs need ``send = "all"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from fedpara_plugins import ModelSpec
from fedpara_plugins.exchange import cast
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.projection import Tangent, solve

__all__ = ["AGGREGATIONS", "aggregate", "closest", "mean"]

State = dict[str, Tensor]
Replies = Sequence[tuple[State, int]]
"""The clients' states, each with its number of examples."""

AGGREGATIONS = ("factors", "composed", "product")

STEPS, ENOUGH, HALVINGS = 10, 0.999, 8
"""Gauss-Newton steps, the ratio of two errors that ends them, and halvings of a step."""


def mean(replies: Replies, like: State) -> State:
    """Return FedAvg's mean of the clients' states, by numbers of examples."""
    total = sum(examples for _, examples in replies)
    found = {}
    for name, value in like.items():
        parts = [state[name].double() * (examples / total) for state, examples in replies]
        found[name] = cast(torch.stack(parts).sum(0), value.dtype)
    return found


def aggregate(
    rule: str, spec: ModelSpec, replies: Replies, before: State
) -> tuple[State, float | None]:
    """Return the server's next state, and what it misses of the round's movement.

    Args:
        rule: one of `AGGREGATIONS`.
        spec: of the model.
        replies: of the round.
        before: what the clients started from.

    Returns:
        The state, and |mean of weights - weights of the state| / |mean of weights - weights
        before|, all weights together; None for a model without factors.
    """
    found = mean(replies, before)
    total = sum(examples for _, examples in replies)
    missed = moved = 0.0
    for weight, plan in spec.weights.items():
        keys = spec.factor_keys(weight)
        factors = factors_of(keys, found)
        wanted = sum(
            (plan.compose(factors_of(keys, state)) * (examples / total))
            for state, examples in replies
        )
        assert isinstance(wanted, Tensor)
        if rule == "composed":
            factors = closest(plan, factors, wanted)
            found.update({keys[n]: f.to(found[keys[n]].dtype) for n, f in factors.items()})
        gap = wanted - plan.compose(factors)
        if rule == "product":
            # What clients answer of W0 is what they were sent, which a lossy codec has changed.
            base = spec.base_keys[weight]
            found[base] = (before[base].double() + gap).to(before[base].dtype)
            gap = torch.zeros_like(gap)
        missed += float(gap.square().sum())
        moved += float((wanted - plan.compose(factors_of(keys, before))).square().sum())
    return found, sqrt(missed / moved) if moved else None


def factors_of(keys: Mapping[str, str], state: State) -> State:
    """Return one weight's factors from a state, in float64."""
    return {name: state[key].double() for name, key in keys.items()}


def closest(plan: WeightPlan, factors: State, wanted: Tensor) -> State:
    """Return factors whose update is as close to a wanted one as Gauss-Newton steps come.

    Args:
        plan: of the weight.
        factors: where to start, in float64.
        wanted: the update, shape ``plan.shape``.
    """
    error = float((wanted - plan.compose(factors)).norm())
    for _ in range(STEPS):
        missing = (wanted - plan.compose(factors)).flatten(1)
        size = float(missing.norm())
        if size == 0:
            break
        moves = solve(Tangent(plan, factors), missing / size, iterations=30).moves
        for halving in range(HALVINGS):
            tried = {n: f + moves[n] * (size / 2**halving) for n, f in factors.items()}
            left = float((wanted - plan.compose(tried)).norm())
            if left < error:
                break
        else:
            break
        factors, before, error = tried, error, left
        if error > ENOUGH * before:
            break
    return factors
