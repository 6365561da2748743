"""What the smoke parts leave out: tests that show once more what another test shows.

A test or a case with the marker ``matrix`` runs in whole environments only (`tox run -m matrix`);
the marker's argument says which test shows the same in the smoke part. ``conftest.py`` imports the
hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from harness.cells.environments import selection

__all__ = ["in_turn", "matrix_only", "pytest_collection_modifyitems"]


def matrix_only(*values: Any, reason: str) -> Any:
    """Return a case for ``parametrize`` that the smoke part leaves out."""
    return pytest.param(*values, marks=pytest.mark.matrix(reason))


def in_turn(*axes: Sequence[Any], every: int = 1) -> list[Any]:
    """List all combinations of some values as cases; the smoke part runs few of them.

    It runs one for each value of the longest axis, with the values of the others in turn.

    Args:
        axes: the values of each argument.
        every: of the values of the longest axis, the smoke part runs each so manieth only.
    """
    longest = max(len(axis) for axis in axes)
    chosen = [tuple(axis[i % len(axis)] for axis in axes) for i in range(0, longest, every)]
    reason = "each value is in another case"
    return [
        pytest.param(*row) if row in chosen else matrix_only(*row, reason=reason)
        for row in product(*axes)
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what has the marker ``matrix`` in a smoke part.

    Raises:
        pytest.UsageError: a marker lacks its reason.
    """
    left_out = []
    for item in items:
        if marker := item.get_closest_marker("matrix"):
            if not marker.args:
                raise pytest.UsageError(f"{item.nodeid}: the marker 'matrix' needs a reason")
            left_out.append(item)
    if selection() == "smoke" and left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
