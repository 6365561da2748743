"""The choice of the smoke parts, which leave out what another test shows already.

Two markers say so. A test or a case with ``matrix(reason)`` runs in whole environments only
(`tox run -m matrix`). Of the cases of a test with ``in_turn``, the smoke part runs so many that
each value of each argument is in one of them; with ``in_turn(every=3)`` a third of those.

``conftest.py`` imports the hook.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from harness.cells.environments import selection

__all__ = ["MARKERS", "each_value_once", "matrix_only", "pytest_collection_modifyitems"]

MARKERS = (
    "matrix(reason): the smoke part shows it in another test",
    "in_turn(every=1): the smoke part runs each value of each argument in one case",
)

Value = tuple[str, str]
Values = frozenset[Value]
"""Arguments of a case by name."""


def matrix_only(*values: Any, reason: str) -> Any:
    """Return a case for ``parametrize`` that the smoke part leaves out."""
    return pytest.param(*values, marks=pytest.mark.matrix(reason))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, in a smoke part, what its markers say.

    Raises:
        pytest.UsageError: a marker lacks its reason.
    """
    left_out = _matrix_only(items) | _out_of_turn(items)
    if selection() == "smoke" and left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _matrix_only(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    found = set()
    for item in items:
        if marker := item.get_closest_marker("matrix"):
            if not marker.args:
                raise pytest.UsageError(f"{item.nodeid}: the marker 'matrix' needs a reason")
            found.add(item)
    return found


def _out_of_turn(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("in_turn"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    found: set[pytest.Item] = set()
    for cases in tests.values():
        marker = cases[0].get_closest_marker("in_turn")
        every = marker.kwargs.get("every", 1) if marker else 1
        chosen = each_value_once([_values(case) for case in cases])[::every]
        found |= {case for place, case in enumerate(cases) if place not in chosen}
    return found


def each_value_once(cases: Sequence[Values]) -> list[int]:
    """Choose cases such that each value is in one of them, and none in many more than others.

    Greedy: each next case has the most values that are in none before; of those with equally many,
    its values are in the fewest cases before.

    Args:
        cases: the values of each.

    Returns:
        Their places, in order of choice.
    """
    chosen, counts = list[int](), Counter[Value]()

    def gain(place: int) -> tuple[int, int]:
        values = cases[place]
        return sum(not counts[value] for value in values), -sum(counts[value] for value in values)

    while any(not counts[value] for values in cases for value in values):
        place = max(range(len(cases)), key=gain)
        chosen.append(place)
        counts.update(cases[place])
    return chosen


def _values(case: pytest.Item) -> Values:
    callspec: Any = getattr(case, "callspec", None)
    params = callspec.params.items() if callspec else ()
    return frozenset((name, repr(value)) for name, value in params)
