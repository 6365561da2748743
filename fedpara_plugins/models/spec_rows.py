"""Rows of a `ModelSpec` in a payload's header: how they are written, read and compared."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.models.wrapper_names import wrapper_hint
from fedpara_plugins.plugins import methods

__all__ = [
    "check_same_rows",
    "compared_part",
    "frozen_buffers",
    "frozen_rows",
    "merged_names",
    "plan_from_row",
    "row_of_plan",
]


_HASH = re.compile("[0-9a-f]{32}")


def row_of_plan(weight: str, plan: WeightPlan) -> list[Any]:
    """Return plain values that describe one factorised weight.

    Args:
        weight: full name of the dense weight.
        plan: its plan.
    """
    numbers = [plan.scale, plan.factor_std, plan.private_std, plan.variance]
    row = [weight, plan.method.name, list(plan.shape), plan.rank, numbers, plan.tanh]
    if plan.residual:  # releases that know no residual form refuse a row of eight entries
        return [*row, plan.start, ["frozen", plan.core, plan.one_sided]]
    return row if plan.start == 1 else [*row, plan.start]


def compared_part(row: list[Any]) -> list[Any]:
    """Return the part of a row in which two sides must agree: all but the start."""
    return [*row[:6], *row[7:]]


def plan_from_row(row: list[Any]) -> WeightPlan:
    """Return the plan that a row of `row_of_plan` describes.

    Raises:
        PayloadError: a method that is not installed here.
        ValueError, TypeError: the row is malformed.
    """
    weight, method, shape, rank, numbers, tanh, *rest = row
    scale, factor_std, private_std, variance = map(float, numbers)
    start, residual = float(rest[0]) if rest else 1.0, rest[1:]
    core, one_sided = _residual_form(residual)
    sizes = [*shape, rank]
    if not (len(shape) >= 2 and all(type(size) is int and 1 <= size < 2**40 for size in sizes)):
        raise ValueError(f"no weight can have shape {str(shape)[:60]} and rank {str(rank)[:20]}")
    if not all(map(math.isfinite, (scale, factor_std, private_std, variance))):
        raise ValueError(f"numbers that are not finite: {str(numbers)[:80]}")
    if not 0 <= start <= 1:
        raise ValueError(f"no weight can start at {str(start)[:20]} of its spread")
    if method not in methods():
        raise PayloadError(
            f"{str(weight)[:200]!r}: the other side uses method {str(method)[:40]!r}, which is not "
            f"installed here (known: {', '.join(methods())}). Install the plugin that provides it."
        )
    return WeightPlan(
        name=str(weight).rpartition(".")[2],
        shape=tuple(shape),
        method=methods()[method].as_update() if residual else methods()[method],
        rank=rank,
        scale=scale,
        factor_std=factor_std,
        private_std=private_std,
        variance=variance,
        tanh=bool(tanh),
        start=start,
        residual=bool(residual),
        core=core,
        one_sided=one_sided,
    )


def _residual_form(rest: Sequence[Any]) -> tuple[bool, bool]:
    """Return `WeightPlan.core` and `WeightPlan.one_sided` from the end of a row.

    Raises:
        ValueError, TypeError: it is malformed.
    """
    if not rest:
        return True, False
    ((base, core, one_sided),) = rest
    if base != "frozen" or type(core) is not bool or type(one_sided) is not bool:
        raise ValueError(f"no weight can have the form {str(rest)[:60]}")
    return core, one_sided


def frozen_rows(rows: Sequence[Sequence[Any]]) -> list[tuple[int, str, str]]:
    """Return place, name and hash of the tensors that a message leaves out as frozen.

    Args:
        rows: anything that claims to be such rows.

    Raises:
        ValueError, TypeError: they are malformed.
    """
    found = [(place, key, digest) for place, key, digest in rows]
    for _, key, digest in found:
        if not (isinstance(key, str) and isinstance(digest, str) and _HASH.fullmatch(digest)):
            raise ValueError(
                f"a frozen tensor has name {str(key)[:40]!r}, hash {str(digest)[:40]!r}"
            )
    return found


def frozen_buffers(places: Sequence[Any], frozen: Sequence[tuple[int, str, str]]) -> frozenset[str]:
    """Return the names of those frozen tensors that are buffers.

    Args:
        places: anything that claims to be their places among all names.
        frozen: what `frozen_rows` returned.

    Raises:
        ValueError, TypeError: a place is not that of a frozen tensor.
    """
    names = {place: key for place, key, _ in frozen}
    if not isinstance(places, list) or not all(type(n) is int and n in names for n in places):
        raise ValueError(f"frozen buffers have places {str(places)[:40]}")
    return frozenset(names[place] for place in places)


def merged_names(shared: Sequence[str], private: Sequence[Sequence[Any]]) -> tuple[str, ...]:
    """Return all names in order, from the shared ones and the private ones with their places.

    Args:
        shared: names in order.
        private: pairs of place among all names, and name.

    Raises:
        ValueError: the places are not distinct places among all names.
    """
    placed = {place: str(key) for place, key in private}
    count = len(shared) + len(private)
    # `isinstance` takes a bool for an int; JSON tells them apart.
    if len(placed) != len(private) or not all(type(n) is int and 0 <= n < count for n in placed):
        raise ValueError("the places of the private names are not distinct places")
    rest = iter(shared)
    return tuple(placed[place] if place in placed else next(rest) for place in range(count))


def check_same_rows(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], *, here: str, there: str
) -> None:
    """Raise unless two descriptions agree in everything but the names of the state.

    Args:
        mine: the entries ``weights``, ``seed`` and ``own`` of `ModelSpec.to_json`.
        theirs: the other side's `ModelSpec.to_json`, or anything that claims to be one.
        here: this side, in words.
        there: the other side, in words.

    Raises:
        MismatchError: the message names the first difference and both values.
        PayloadError: ``theirs`` is malformed.
    """
    try:
        my_rows = {row[0]: _row_text(row) for row in mine["weights"]}
        their_rows = {str(row[0]): _row_text(row) for row in theirs["weights"]}
        seed, own = theirs["seed"], theirs.get("own", {})
        if not isinstance(own, Mapping) or not all(isinstance(key, str) for key in own):
            raise TypeError("'own' is no object with names as keys")
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise PayloadError(f"the header's model description is malformed: {error!r}") from error
    for weight in [*my_rows, *their_rows]:
        if my_rows.get(weight) != their_rows.get(weight):
            raise MismatchError(
                f"the model differs at {weight[:200]!r}: {here} has "
                f"{my_rows.get(weight, 'dense')}, {there} has {their_rows.get(weight, 'dense')}. "
                f"Build the same model with the same fedpara options (method; gamma, ratio or "
                f"rank) on both sides." + wrapper_hint(their_rows, my_rows)
            )
    _check_private(mine["own"], own, here=here, there=there)
    if seed != mine["seed"]:
        raise MismatchError(
            f"the private factors start from another seed: {here} has seed {mine['seed']}, "
            f"{there} has seed {str(seed)[:40]}. Set the same fedpara option seed on both sides."
        )


def _check_private(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], *, here: str, there: str
) -> None:
    if theirs != mine:
        apart = sorted(set(mine) ^ set(theirs)) or sorted(mine)
        raise MismatchError(
            f"the option private differs: {here} keeps {sorted(mine)}, {there} keeps "
            f"{str(sorted(theirs))[:500]} (differing: {str(apart)[:500]}). Set the same fedpara "
            f"option private on both sides."
        )


def _row_text(row: list[Any]) -> str:
    """Return all of a weight's row but its name, as text for people."""
    _, method, shape, rank, (scale, *std), tanh, *residual = compared_part(row)
    core, one_sided = _residual_form(residual)
    text = "a frozen weight and an update by " if residual else ""
    text += f"{str(method)[:40]} rank {str(rank)[:20]} shape {str(tuple(shape))[:60]} "
    text += f"scale {scale:.9g} first spread {', '.join(f'{number:.9g}' for number in std)}"
    texts = [text, "tanh" if tanh else "", "" if core else "without core"]
    return " ".join(filter(None, [*texts, "train=right" if one_sided else ""]))
