"""A few rows of a table such that every pair of values stands in one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product

__all__ = ["pairs_of", "pairwise"]

Pair = tuple[str, str, str, str]


def pairwise(factors: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Return rows such that any two values of two different factors share at least one row.

    Greedy: each row begins with the first pair that is still missing, and each further factor
    takes the value that adds most missing pairs. The result depends on nothing but the argument.

    Args:
        factors: values by factor, two factors at least.
    """
    missing = {
        (a, x, b, y): None
        for a, b in combinations(factors, 2)
        for x, y in product(factors[a], factors[b])
    }
    rows = []
    while missing:
        a, x, b, y = next(iter(missing))
        row = {a: x, b: y}
        for name in factors:
            if name not in row:
                row[name] = max(
                    factors[name],
                    key=lambda value: sum(
                        pair in missing for pair in pairs_of({**row, name: value}, factors)
                    ),
                )
        for pair in pairs_of(row, factors):
            missing.pop(pair, None)
        rows.append({name: row[name] for name in factors})
    return rows


def pairs_of(row: Mapping[str, str], factors: Mapping[str, Sequence[str]]) -> list[Pair]:
    """Return the pairs of a row, its factors in the order of ``factors``."""
    present = [name for name in factors if name in row]
    return [(a, row[a], b, row[b]) for a, b in combinations(present, 2)]
