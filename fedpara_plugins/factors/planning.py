"""Derivation of a weight's plan from its shape and the options, or why it stays dense."""

from __future__ import annotations

from math import prod, sqrt

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.factors.methods import Method
from fedpara_plugins.factors.plan import WeightPlan, WeightSlot
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

__all__ = ["plan_weight", "portable"]

SMALLEST_SIDE = 4
"""A weight with fewer rows or columns (a 3-channel stem, say) has no rank to save."""


def plan_weight(slot: WeightSlot, method: Method, config: FedParaConfig) -> WeightPlan | str:
    """Plan one weight.

    Args:
        slot: the dense layer's weight.
        method: combines the operands.
        config: the options of the layer.

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
    rank = _choose_rank(slot.shape, method, config)
    if rank is None:
        low = smallest_full_rank(slot.shape)
        needed = parameter_count(slot.shape, low)
        return f"full rank needs R={low}: {needed:,} entries, the dense weight has {dense:,}"
    entries = parameter_count(slot.shape, rank, operands=method.operands)
    if entries >= dense:
        return f"rank {rank} would hold {entries:,} entries, the dense weight has {dense:,}"
    return _scaled_plan(slot, method, rank, config)


def _choose_rank(shape: tuple[int, ...], method: Method, config: FedParaConfig) -> int | None:
    if config.rank is not None:
        return min(config.rank, *shape[:2])
    if config.ratio is not None:
        rank = ratio_rank(shape, config.ratio)
        if method.operands != 2 and smallest_ratio(shape, config.ratio) is not None:
            # FedPara itself cannot be matched here: its full-rank minimum exceeds the ratio.
            budget = round(config.ratio * prod(shape))
            return matched_rank(shape, budget, operands=method.operands)
    else:
        low = smallest_full_rank(shape)
        if parameter_count(shape, low) >= prod(shape):
            return None
        rank = gamma_rank(shape, config.gamma)
    if method.operands == 2:
        return rank
    # For an equal comparison, other methods get FedPara's number of entries, not its rank.
    return matched_rank(shape, parameter_count(shape, rank), operands=method.operands)


def portable(number: float) -> float:
    """Round to nine digits: powers and roots then agree on all platforms, and JSON keeps them."""
    return float(f"{number:.9g}")


def _target_variance(slot: WeightSlot, config: FedParaConfig) -> float:
    if config.variance == "default":
        return slot.variance
    return 2 / slot.fan_in if config.variance == "he" else float(config.variance)


def _scaled_plan(slot: WeightSlot, method: Method, rank: int, config: FedParaConfig) -> WeightPlan:
    """Complete a plan with the scale and standard deviations for its variance v and speed K.

    With F shared factors of equal standard deviation σ in S shared operands, K = v Σ 1/σ² =
    F v / σ², so σ² = F v / K. Then Var(W) = s² (a σ^(F/S))^(2S), where a is the standard deviation
    of an operand of unit factors: √R, or R with a core. A private operand starts at zero, since one
    of its factors does; the others have a standard deviation t with K_private = v R t² (matrix) or
    v R² t⁴ (kernel). For tanh see `factors.tanh`.
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
