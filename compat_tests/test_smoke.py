"""The choice of the smoke parts: each value once, and a reason for what is left out."""

from __future__ import annotations

from itertools import product

import pytest

from harness.matrix.smoke import each_value_once, pytest_collection_modifyitems

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(
    ("sizes", "count"), [((3, 3), 3), ((7, 2), 7), ((4, 4, 2), 4), ((1,), 1), ((5, 3, 2), 5)]
)
def test_each_value_of_each_axis_is_in_one_case(sizes: tuple[int, ...], count: int) -> None:
    rows = list(product(*(range(size) for size in sizes)))
    cases = [frozenset((str(axis), str(value)) for axis, value in enumerate(row)) for row in rows]
    chosen = [rows[place] for place in each_value_once(cases)]
    assert len(chosen) == len(set(chosen)) == count
    for axis, size in enumerate(sizes):
        values = [row[axis] for row in chosen]
        assert set(values) == set(range(size))
        assert max(map(values.count, values)) <= -(-count // size)


def test_the_smoke_part_alone_leaves_out_what_is_marked(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeconftest("from harness.matrix.smoke import pytest_collection_modifyitems")
    pytester.makepyfile("""
        import pytest

        @pytest.mark.in_turn
        @pytest.mark.parametrize("a", [1, 2, 3])
        @pytest.mark.parametrize("b", "xy")
        def test_turns(a, b): pass

        @pytest.mark.matrix("test_turns shows it")
        def test_repeated(): pass

        def test_plain(): pass
    """)
    for environment, passed in (("flower-latest-smoke", 4), ("flower-latest", 8), ("", 8)):
        monkeypatch.setenv("FEDPARA_MATRIX_ENV", environment)
        pytester.inline_run("-p", "no:cacheprovider").assertoutcome(passed=passed)


def test_a_mark_without_a_reason_is_refused(pytester: pytest.Pytester) -> None:
    items = pytester.getitems("""
        import pytest

        @pytest.mark.matrix
        def test_repeated(): pass
    """)
    with pytest.raises(pytest.UsageError, match="test_repeated: the marker 'matrix' needs a"):
        pytest_collection_modifyitems(items[0].config, items)
