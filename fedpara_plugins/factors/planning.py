"""Derivation of a weight's plan from its shape and the options, or why it stays dense."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, log, prod, sqrt

import torch

from fedpara_plugins.config import VARIANCES, FedParaConfig
from fedpara_plugins.factors.compose import combine_sum
from fedpara_plugins.factors.initialise import PLAIN
from fedpara_plugins.factors.methods import Method
from fedpara_plugins.factors.plan import WeightPlan, WeightSlot, matrix_shape
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

__all__ = ["plan_weight", "portable", "stated_speed", "usual_deviation", "with_variance"]

SMALLEST_SIDE = 4
"""A weight with fewer rows or columns (a 3-channel stem, say) has no rank to save."""


BY_KIND = ("torch", "auto", "default")
"""Values of the option ``variance`` that leave a weight its own start; models that an earlier
release pickled hold the last."""

FAR = 1.5
"""How far from its kind's default a standard deviation is a start of the weight's own. Below are
what sampling adds and Xavier's rule for most shapes; above are He's, LeCun's and GPT's."""

LARGER = 2.0
"""Ratio between the standard deviations that plans of large weights have. They are few, so that two
sides that draw a weight by one recipe plan it alike; `WeightPlan.start` makes up the difference."""


def plan_weight(
    slot: WeightSlot,
    method: Method,
    config: FedParaConfig,
    *,
    spread: float | None = None,
    without_norms: bool = False,
) -> WeightPlan | str:
    """Plan one weight.

    Args:
        slot: the dense layer's weight.
        method: combines the operands.
        config: the options of the layer.
        spread: root mean square of the dense weight. If it is far from the kind's default, the
            fresh weight keeps it, unless the option ``variance`` says otherwise. None does not ask.
        without_norms: whether the model has no norm layer, which decides for ``variance="auto"``.

    Returns:
        The plan, or the reason (a sentence) why the weight is better left dense.
    """
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
    if config.base == "frozen" and not _starts_at_zero(method):
        return f"method {method.name} gives no update that is zero where one operand is"
    core = _has_core(method, config) or not is_kernel(slot.shape)
    shape = matrix_shape(slot.shape, core=core)
    rank = _choose_rank(slot.shape, shape, method, config)
    if rank is None:
        low = smallest_full_rank(slot.shape)
        needed = parameter_count(slot.shape, low)
        return f"full rank needs R={low}: {needed:,} entries, the dense weight has {dense:,}"
    entries = parameter_count(shape, rank, operands=method.operands)
    if entries >= dense:
        return f"rank {rank} would hold {entries:,} entries, the dense weight has {dense:,}"
    plan = _scaled_plan(slot, method, rank, config, core=core, variance=_target(slot, config))
    if plan.residual:
        # The update starts at zero whatever the dense weight is, so both sides plan it alike.
        return replace(plan, start=0.0)
    by_kind = config.variance in BY_KIND
    if by_kind and spread is not None and _is_own_start(plan, spread):
        return _with_own_start(plan, spread)
    if config.variance == "auto" and without_norms and slot.he:
        he = 2 / slot.fan_in
        return _scaled_plan(slot, method, rank, config, core=core, variance=he)
    return plan


def _starts_at_zero(method: Method) -> bool:
    """Return whether the update is zero where the first shared operand and private ones are."""
    zero = {method.first_shared, *method.private}
    values = [0.0 if i in zero else 1.0 for i in range(method.operands)]
    operands = [torch.full((1, 1), value, **PLAIN) for value in values]
    return not method.as_update().combine(operands).any()


def _has_core(method: Method, config: FedParaConfig) -> bool:
    """Return whether a kernel's operands have a core: all but LoRA's, unless an option says so."""
    if config.core is not None:
        return config.core
    return config.base != "frozen" or method.operands - len(method.private) > 1


def _is_own_start(plan: WeightPlan, spread: float) -> bool:
    return not 1 / FAR <= spread / sqrt(plan.variance) <= FAR


def _with_own_start(plan: WeightPlan, spread: float) -> WeightPlan:
    """Return the plan of a fresh weight of this root mean square, with the same speeds.

    A small weight starts small and keeps the plan of its kind: it grows in training, and its speed
    must not grow with it. A large weight needs a smaller scale, that of a larger variance.
    """
    ratio = spread / sqrt(plan.variance)
    if ratio > 1:
        larger = 2 * FAR * LARGER ** max(0, ceil(log(ratio / (2 * FAR), LARGER)))
        variance = min(plan.variance * larger**2, VARIANCES[1])
        plan = with_variance(plan, max(variance, plan.variance))
    return replace(plan, start=portable(min(1.0, spread / sqrt(plan.variance))))


def _choose_rank(
    shape: tuple[int, ...], made_by: tuple[int, ...], method: Method, config: FedParaConfig
) -> int | None:
    """Return the rank of the options' rule; None if full rank holds no fewer entries than dense.

    Args:
        shape: of the weight.
        made_by: the shape by which its factors are made, another one without a core.
        method: combines the operands.
        config: the options of the layer.
    """
    if config.rank is not None:
        return min(config.rank, *made_by[:2])
    if config.ratio is not None:
        rank = ratio_rank(shape, config.ratio)
        if method.operands != 2 and smallest_ratio(shape, config.ratio) is not None:
            # FedPara itself cannot be matched here: its full-rank minimum exceeds the ratio.
            budget = round(config.ratio * prod(shape))
            return matched_rank(made_by, budget, operands=method.operands)
    else:
        low = smallest_full_rank(shape)
        if parameter_count(shape, low) >= prod(shape):
            return None
        rank = gamma_rank(shape, config.gamma)
    if method.operands == 2 and made_by == shape:
        return rank
    # For an equal comparison, all others get FedPara's number of entries, not its rank.
    return matched_rank(made_by, parameter_count(shape, rank), operands=method.operands)


def portable(number: float) -> float:
    """Round to nine digits: powers and roots then agree on all platforms, and JSON keeps them."""
    return float(f"{number:.9g}")


def _target(slot: WeightSlot, config: FedParaConfig) -> float:
    if config.variance in BY_KIND:
        return slot.variance
    return 2 / slot.fan_in if config.variance == "he" else float(config.variance)


def _scaled_plan(
    slot: WeightSlot,
    method: Method,
    rank: int,
    config: FedParaConfig,
    *,
    core: bool,
    variance: float,
) -> WeightPlan:
    """Complete a plan by the numbers that variance and speeds decide."""
    residual = config.base == "frozen"
    plan = WeightPlan(
        name=slot.name,
        shape=slot.shape,
        method=method.as_update() if residual else method,
        rank=rank,
        scale=1.0,
        factor_std=1.0,
        private_std=0.0,
        variance=variance,
        tanh=config.tanh,
        recompute=config.recompute,
        residual=residual,
        core=core,
        one_sided=config.train == "right",
    )
    speed = config.speed if config.speed is not None else method.speed
    return _with_numbers(plan, speed, config.private_speed)


def _with_numbers(plan: WeightPlan, speed: float, private_speed: float) -> WeightPlan:
    """Return the plan with scale and standard deviations for its variance v and these speeds K.

    With F shared factors of equal standard deviation σ in S shared operands, K = v Σ 1/σ² =
    F v / σ², so σ² = F v / K. Then Var(W) = s² (a σ^(F/S))^(2S), where a is the standard deviation
    of an operand of unit factors: √R, or R with a core. A private operand starts at zero, since one
    of its factors does; the others have a standard deviation t with K_private = v R t² (matrix) or
    v R² t⁴ (kernel). Where private operands are added to the shared ones instead of multiplied, the
    square of their own multiplier stands for v. For tanh see `factors.tanh`.
    """
    method, variance = plan.method, plan.variance
    shared = method.operands - len(method.private)
    factors, unit = shared * _per_operand(plan), _unit(plan)
    spread, bound = variance ** (0.5 / shared), 1.0
    if plan.tanh:
        spread, bound = tanh_spread(variance, shared), tanh_bound(variance)
    std = sqrt(factors * variance * _tanh_gain(plan) / speed)
    plan = replace(
        plan,
        scale=portable(bound * spread**shared / (unit**shared * std**factors)),
        factor_std=portable(std),
        private_std=0.0,
        variance=portable(variance),
    )
    if not method.private:
        return plan
    private_std = (private_speed / _private_gain(plan)) ** (0.5 / (_per_operand(plan) - 1))
    return replace(plan, private_std=portable(private_std))


def _private_gain(plan: WeightPlan) -> float:
    """Return K of a private operand whose factors, but the one that is zero, have size 1."""
    outside = plan.outer**2 if plan.method.combine is combine_sum else plan.variance
    return outside * _unit(plan) ** 2


def stated_speed(plan: WeightPlan) -> float:
    """Return K, the speed that a plan gives its fresh weight."""
    shared = plan.method.operands - len(plan.method.private)
    factors = shared * _per_operand(plan)
    return factors * plan.variance * _tanh_gain(plan) / plan.factor_std**2


def with_variance(plan: WeightPlan, variance: float) -> WeightPlan:
    """Return the plan for another variance, with the same speeds."""
    speed = stated_speed(plan)
    private = _private_speed(plan)
    return _with_numbers(replace(plan, variance=variance), speed, private)


def usual_deviation(plan: WeightPlan, factor: str) -> float:
    """Return the standard deviation that a factor has where its plan's K and variance hold.

    It is what a fresh factor has, but for one that starts at zero. A private one of these has,
    by the same formula with F = 1, sqrt(v / K_private): its operand then changes the weight as much
    as the weight's own size.

    Args:
        plan: the weight's plan.
        factor: one of its `factor_names`.
    """
    if factor not in plan.private_names:
        return plan.factor_std
    if not plan.zero_at_start(factor):
        return plan.private_std
    return sqrt(plan.variance / _private_speed(plan))


def _private_speed(plan: WeightPlan) -> float:
    return plan.private_std ** (2 * (_per_operand(plan) - 1)) * _private_gain(plan)


def _per_operand(plan: WeightPlan) -> int:
    return 3 if plan.kernel else 2


def _unit(plan: WeightPlan) -> float:
    """Return the standard deviation of an operand's entries if those of its factors are 1."""
    return float(plan.rank) if plan.kernel else sqrt(plan.rank)


def _tanh_gain(plan: WeightPlan) -> float:
    """Return how much faster tanh makes factors of the same size; 1 without tanh."""
    if not plan.tanh:
        return 1.0
    shared = plan.method.operands - len(plan.method.private)
    spread, bound = tanh_spread(plan.variance, shared), tanh_bound(plan.variance)
    return (bound * spread**shared) ** 2 / plan.variance * tanh_speed(spread, shared)
