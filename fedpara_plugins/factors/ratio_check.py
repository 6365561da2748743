"""The error for a ratio that no rank can reach; it names the ratios that can be reached."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, prod

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.ranks import parameter_count, smallest_full_rank, smallest_ratio

__all__ = ["refuse_unreachable_ratios"]


def refuse_unreachable_ratios(weights: Iterable[tuple[str, WeightPlan, float]]) -> None:
    """Raise if a weight would hold more than its ratio of the dense entries.

    Args:
        weights: full name, plan and ratio of every weight that is factorised by ratio.

    Raises:
        ConversionError: names the first such weight, how many there are, and the remedies.
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
    count = f"; the same holds for {len(missed)} of {len(asked)} weights" if len(asked) > 1 else ""
    enough = max(row[3] for row in missed)
    raise ConversionError(
        f"{name}: option ratio={ratio:g} cannot be reached: the factors of a "
        f"{'x'.join(map(str, plan.shape))} weight hold at least {_rounded_up(least):g} of its "
        f"entries ({plan.method.name}){count}. {_remedies(name, plan, enough)}"
    )


def _remedies(name: str, plan: WeightPlan, enough: float) -> str:
    layer = name.rpartition(".")[0]
    ways = [f"ask for ratio={_rounded_up(enough):g} or more"]
    if plan.method.operands == 2:
        share = parameter_count(plan.shape, smallest_full_rank(plan.shape)) / prod(plan.shape)
        own = f"overrides='{layer}: gamma=0'" if layer else "gamma=0"
        ways.append(f"give it another rank rule, such as {own} ({_rounded_up(share):g}) or a rank")
        ways.append("use method lowrank, which has no full-rank minimum")
    if layer:
        ways.append(f"leave it dense with exclude='{layer}'")
    return f"Remedies: {'; '.join(ways)}"


def _rounded_up(share: float) -> float:
    """Round up to four decimals, so that asking for the figure succeeds."""
    return ceil(share * 10_000) / 10_000
