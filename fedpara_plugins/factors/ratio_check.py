"""A ratio that no rank can meet is an error, and the message says what can be had."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, prod

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.ranks import parameter_count, smallest_full_rank, smallest_ratio

__all__ = ["refuse_unreachable_ratios"]


def refuse_unreachable_ratios(weights: Iterable[tuple[str, WeightPlan, float]]) -> None:
    """Raise if a weight would hold more than the ratio that was asked for it.

    Args:
        weights: full name, plan and ratio of every weight that is factorised by ratio.

    Raises:
        ConversionError: it names the first such weight, how many there are, and the remedies.
    """
    asked = list(weights)
    missed = [
        (name, plan, ratio, least)
        for name, plan, ratio in asked
        if (least := smallest_ratio(plan.shape, ratio, operands=plan.method.operands)) is not None
    ]
    if not missed:
        return
    name, plan, ratio, least = missed[0]
    count = f"; so it is with {len(missed)} of {len(asked)} weights" if len(asked) > 1 else ""
    enough = max(row[3] for row in missed)
    raise ConversionError(
        f"{name}: option ratio={ratio:g} cannot be reached: the factors of a "
        f"{'x'.join(map(str, plan.shape))} weight hold at least {_up(least):g} of its entries "
        f"({plan.method.name}){count}. {_remedies(name, plan, enough)}"
    )


def _remedies(name: str, plan: WeightPlan, enough: float) -> str:
    layer = name.rpartition(".")[0]
    ways = [f"ask for ratio={_up(enough):g} or more"]
    if plan.method.operands == 2:
        share = parameter_count(plan.shape, smallest_full_rank(plan.shape)) / prod(plan.shape)
        own = f"overrides='{layer}: gamma=0'" if layer else "gamma=0"
        ways.append(f"give it another rank rule, such as {own} ({_up(share):g}) or a rank")
        ways.append("take method lowrank, which need not be able to have full rank")
    if layer:
        ways.append(f"leave it dense with exclude='{layer}'")
    return f"Remedies: {'; '.join(ways)}"


def _up(share: float) -> float:
    """Four decimals, rounded up, so that asking for the figure succeeds."""
    return ceil(share * 10_000) / 10_000
