"""Plan, then execute: everything about one factorised weight that shapes and config decide.

A `WeightPlan` is computed once when a model is converted. Two sides that convert the same model
with the same config derive equal plans, so nothing in it ever has to travel to be known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod, sqrt

import torch
from torch import Tensor

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.factors.compose import operand
from fedpara_plugins.factors.fast.conditions import as_autocast_casts, may_run
from fedpara_plugins.factors.fast.form import Form, by_operand, form_of, is_known
from fedpara_plugins.factors.fast.weight import Recipe, compose
from fedpara_plugins.factors.methods import Method
from fedpara_plugins.factors.ranks import (
    gamma_rank,
    is_kernel,
    matched_rank,
    parameter_count,
    ratio_rank,
    smallest_full_rank,
    smallest_ratio,
)
from fedpara_plugins.factors.tanh import tanh_bound, tanh_speed, tanh_spread

__all__ = ["WeightPlan", "WeightSlot", "compose_together", "factor_key", "plan_weight", "portable"]

SMALLEST_SIDE = 4
"""A weight with fewer rows or columns (a 3-channel stem, say) has no rank to save."""


RECOMPUTE_BYTES = 4 << 20
"""From this size on (in float32) a weight's two products are computed again in backward, a block of
rows at a time: held ones have left the cache by then, and double a step's memory."""


@dataclass(frozen=True)
class WeightSlot:
    """A weight of a dense layer that could be factorised.

    Attributes:
        name: the attribute of the layer, such as ``weight``.
        shape: (m, n) or (O, I, k1, ...).
        fan_in: inputs per output, for the target variance.
        variance: the variance which this kind of layer gives its weight by default.
        obstacle: why this weight cannot be composed (a clause for the report); "" if it can.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int
    variance: float
    obstacle: str = ""


@dataclass(frozen=True)
class WeightPlan:
    """A weight that is factorised, and how.

    Attributes:
        name: the attribute of the layer, such as ``weight``.
        shape: the dense weight's shape.
        method: combines the operands.
        rank: R of every operand.
        scale: fixed scalar s in W = s * combine(operands); never learned, never sent.
        factor_std: standard deviation of every shared factor's entries at the start.
        private_std: the same for private factors, those that do not start at zero.
        variance: target of the composed weight's variance at the start.
        tanh: whether every operand passes through tanh (paper, section 3).
        recompute: whether backward computes the operands' products again instead of holding them;
            None lets their size decide. Each side's own business, no part of what two must share.
    """

    name: str
    shape: tuple[int, ...]
    method: Method
    rank: int
    scale: float
    factor_std: float
    private_std: float
    variance: float
    tanh: bool = False
    recompute: bool | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        # Found now: before Python 3.12 `cached_property` takes a lock, which torch.compile refuses.
        _ = self.keys

    @property
    def kernel(self) -> bool:
        """Whether the operands have a core."""
        return is_kernel(self.shape)

    @cached_property
    def factor_names(self) -> list[str]:
        """x1, y1, t1, ... as far as this weight has them."""
        return self.method.factor_names(kernel=self.kernel)

    @cached_property
    def keys(self) -> list[str]:
        """Names of the layer's parameters that the factors are, in the order of `factor_names`."""
        return [factor_key(self.name, factor) for factor in self.factor_names]

    @property
    def private_names(self) -> list[str]:
        """Those of `factor_names` that never leave the device."""
        return self.method.private_names(kernel=self.kernel)

    @property
    def parameters(self) -> int:
        """Entries of all factors, private ones included."""
        return parameter_count(self.shape, self.rank, operands=self.method.operands)

    @property
    def shared_parameters(self) -> int:
        """Entries of the factors that travel."""
        shared = self.method.operands - len(self.method.private)
        return parameter_count(self.shape, self.rank, operands=shared)

    def factor_shape(self, factor: str) -> tuple[int, ...]:
        """Shape of the factor with that name: x (m, R), y (n, R), t (R, R, k1, ...)."""
        if factor[0] == "t":
            return (self.rank, self.rank, *self.shape[2:])
        return (self.shape[0 if factor[0] == "x" else 1], self.rank)

    def zero_at_start(self, factor: str) -> bool:
        """Whether a private factor starts at zero, which makes its whole operand zero."""
        return factor in self.private_names and factor[0] == ("t" if self.kernel else "x")

    def compose(self, factors: Mapping[str, Tensor]) -> Tensor:
        """W = s * combine(operands), of shape ``self.shape``.

        With tanh, the scale goes inside: W = b combine(tanh(s' operand)) with s' such that b and
        the shared operands together carry s. Outside, it would leave tanh nothing to bound.

        Args:
            factors: by name, with the shapes that `factor_shape` gives.
        """
        return self._shaped(self.compose_rows(factors))

    def _shaped(self, rows: Tensor) -> Tensor:
        # A view is a node of autograd, and what factors of other shapes gave is its error.
        return rows if rows.shape == self.shape else rows.view(self.shape)

    def compose_rows(self, factors: Mapping[str, Tensor]) -> Tensor:
        """As `compose`, with some rows of every x only: methods are elementwise, rows independent.

        Returns:
            shape (rows, n k1 ...).
        """
        ordered = self.ordered(factors)
        if not may_run(ordered) or self.form is None:
            return self.compose_plainly(ordered)
        recipe = Recipe(self.form, self.compose_plainly, self.recomputes, len(ordered))
        return compose([recipe], as_autocast_casts(ordered))[0]

    def ordered(self, factors: Mapping[str, Tensor]) -> list[Tensor]:
        """x1, y1, t1, x2, ... in the order of `factor_names`."""
        return [factors[name] for name in self.factor_names]

    def compose_plainly(self, ordered: Sequence[Tensor]) -> Tensor:
        """As `compose_rows`, with torch's own operations, from what `ordered` gives."""
        operands = []
        every = by_operand(ordered, self.method.operands)
        for gain, (x, *others) in zip(self.gains, every, strict=True):
            value = operand(x if gain == 1 else x * gain, *others)
            operands.append(torch.tanh(value) if self.tanh else value)
        value = self.method.combine(operands).flatten(1)
        return value if self.outer == 1 else value * self.outer

    @cached_property
    def form(self) -> Form | None:
        """What the hand-written functions need to know; None if they cannot compute this method."""
        return form_of(self.method, self.gains, tanh=self.tanh, bound=self.outer)

    @cached_property
    def recomputes(self) -> bool:
        """Whether the operands' products are computed again in backward, instead of held."""
        return 4 * prod(self.shape) >= RECOMPUTE_BYTES if self.recompute is None else self.recompute

    @property
    def gains(self) -> tuple[float, ...]:
        """What each operand is multiplied with: on its x, the smallest place there is for it."""
        count = self.method.operands
        if self.tanh:
            shared = count - len(self.method.private)
            inner = (self.scale / self.bound) ** (1 / shared)
            return tuple(1.0 if i in self.method.private else inner for i in range(count))
        return (self.scale, *[1.0] * (count - 1)) if is_known(self.method) else (1.0,) * count

    @property
    def outer(self) -> float:
        """What multiplies the combined operands."""
        if self.tanh:
            return self.bound
        return 1.0 if is_known(self.method) else self.scale

    @property
    def bound(self) -> float:
        """b, the largest value that the shared operands can have together under tanh.

        It is 1, as in the paper, unless so large a variance (an embedding's, say) needs more.
        """
        return tanh_bound(self.variance)


def factor_key(weight: str, factor: str) -> str:
    """The parameter's name: the factor's own where the layer has but one weight."""
    return factor if weight == "weight" else f"{weight}_{factor}"


def compose_together(
    plans: Sequence[WeightPlan], factors: Sequence[Mapping[str, Tensor]]
) -> list[Tensor]:
    """As `WeightPlan.compose` of each, in one node of autograd where that can be."""
    recipes = [
        Recipe(plan.form, plan.compose_plainly, plan.recomputes, len(plan.factor_names))
        for plan in plans
        if plan.form is not None
    ]
    flat = [f for plan, own in zip(plans, factors, strict=True) for f in plan.ordered(own)]
    if len(recipes) < len(plans) or not may_run(flat):
        return [plan.compose(own) for plan, own in zip(plans, factors, strict=True)]
    weights = compose(recipes, as_autocast_casts(flat))
    return [plan._shaped(weight) for weight, plan in zip(weights, plans, strict=True)]


def plan_weight(slot: WeightSlot, method: Method, config: FedParaConfig) -> WeightPlan | str:
    """The plan for one weight, or the reason (a sentence) why it is better left dense."""
    if slot.obstacle:
        return slot.obstacle
    dense = prod(slot.shape)
    if dense < config.min_size:
        return f"{dense:,} parameters, fewer than min_size={config.min_size:,}"
    if min(slot.shape[:2]) < SMALLEST_SIDE:
        side = min(slot.shape[:2])
        return (
            f"the weight's smaller side is {side} (fewer than {SMALLEST_SIDE}), as in first and "
            f"depthwise layers: factors would save nothing"
        )
    rank = _choose_rank(slot.shape, method, config)
    if rank is None:
        low = smallest_full_rank(slot.shape)
        needed = parameter_count(slot.shape, low)
        return f"full rank needs R={low}: {needed:,} entries, the dense weight has {dense:,}"
    entries = parameter_count(slot.shape, rank, operands=method.operands)
    if entries >= dense:
        return f"rank {rank} would hold {entries:,} entries, the dense weight has {dense:,}"
    return _with_scale(slot, method, rank, config)


def _choose_rank(shape: tuple[int, ...], method: Method, config: FedParaConfig) -> int | None:
    if config.rank is not None:
        return min(config.rank, *shape[:2])
    if config.ratio is not None:
        rank = ratio_rank(shape, config.ratio)
        if method.operands != 2 and smallest_ratio(shape, config.ratio) is not None:
            # Nothing of FedPara to be equal to: its full-rank minimum holds more than asked.
            budget = round(config.ratio * prod(shape))
            return matched_rank(shape, budget, operands=method.operands)
    else:
        low = smallest_full_rank(shape)
        if parameter_count(shape, low) >= prod(shape):
            return None
        rank = gamma_rank(shape, config.gamma)
    if method.operands == 2:
        return rank
    # Other forms get the budget, not the rank, that FedPara would have: an equal comparison.
    return matched_rank(shape, parameter_count(shape, rank), operands=method.operands)


def portable(number: float) -> float:
    """Nine digits: what powers and roots give alike on every platform, and JSON carries whole."""
    return float(f"{number:.9g}")


def _target_variance(slot: WeightSlot, config: FedParaConfig) -> float:
    if config.variance == "default":
        return slot.variance
    return 2 / slot.fan_in if config.variance == "he" else float(config.variance)


def _with_scale(slot: WeightSlot, method: Method, rank: int, config: FedParaConfig) -> WeightPlan:
    """Scale and standard deviations that give the target variance and the wanted speed K.

    For F equal-std shared factors in S shared operands: K = v Σ 1/σ² = F v / σ², so σ² = F v / K,
    and Var(W) = s² (a σ^(F/S))^(2S), where an operand of unit factors has std a = √R, or R with a
    core. A private operand starts at zero through one zero factor; its other factors have std t
    with K_private = v R t² (matrix) or v R² t⁴ (kernel). Under tanh see `saturation`.
    """
    kernel = is_kernel(slot.shape)
    per_operand = 3 if kernel else 2
    unit = float(rank) if kernel else sqrt(rank)
    shared = method.operands - len(method.private)
    factors = shared * per_operand
    variance = _target_variance(slot, config)
    speed = config.speed if config.speed is not None else method.speed
    spread, bound = variance ** (0.5 / shared), 1.0
    faster = 1.0
    if config.tanh:
        spread, bound = tanh_spread(variance, shared), tanh_bound(variance)
        faster = (bound * spread**shared) ** 2 / variance * tanh_speed(spread, shared)
    std = sqrt(factors * variance * faster / speed)
    private_std = (config.private_speed / (variance * unit**2)) ** (0.5 / (per_operand - 1))
    return WeightPlan(
        name=slot.name,
        shape=slot.shape,
        method=method,
        rank=rank,
        scale=portable(bound * spread**shared / (unit**shared * std**factors)),
        factor_std=portable(std),
        private_std=portable(private_std) if method.private else 0.0,
        variance=portable(variance),
        tanh=config.tanh,
        recompute=config.recompute,
    )
