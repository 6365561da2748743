"""The values of a reply besides its tensors."""

from __future__ import annotations

import pytest

from fedpara_plugins import PayloadError
from fedpara_plugins.exchange import check_figures, check_hashes, examples_of

INF, NAN = float("inf"), float("nan")
HASH = "ab" * 32


@pytest.mark.parametrize("value", [1, 0.5, 2**53, 1e-300])
def test_a_number_of_examples(value):
    assert examples_of(value) == value
    assert examples_of(value, weighs=False) == value


@pytest.mark.parametrize(
    "value", [-1, NAN, INF, -INF, True, False, "3", None, [3], 1e300, 2**53 + 1, 10**400, -0.5]
)
def test_what_is_no_number_of_examples(value):
    for weighs in (True, False):
        with pytest.raises(PayloadError, match="'num-examples'"):
            examples_of(value, name="num-examples", weighs=weighs)


def test_zero_counts_only_where_nothing_is_weighed_by_it():
    assert examples_of(0, weighs=False) == 0
    with pytest.raises(PayloadError, match="above 0"):
        examples_of(0)


def test_figures_are_finite():
    check_figures(
        "metrics", {"loss": 1.5, "n": 10**400, "text": "nan", "list": [1.0, 2.0], "b": b""}
    )
    for value in (NAN, INF, [1.0, NAN], -INF):
        with pytest.raises(PayloadError, match=r"'metrics' .* as 'loss'"):
            check_figures("metrics", {"ok": 1, "loss": value})


@pytest.mark.parametrize(
    ("holds", "has", "decoders"),
    [
        ({"model": "../../etc/passwd"}, {}, ()),
        ({"model": HASH.upper()}, {}, ()),
        ({"model": HASH + "\n"}, {}, ()),
        ({f"r{n}": HASH for n in range(3000)}, {}, ()),
        ({}, {f"r{n}": [HASH] for n in range(3000)}, ()),
        ({}, {"model": [HASH] * 100}, ()),
        ({}, {"model": [HASH, "x"]}, ()),
        ({}, {}, ["zlib"] * 100),
        ({}, {}, ["z" * 100]),
    ],
)
def test_what_a_client_states_about_itself_is_bounded(holds, has, decoders):
    check_hashes({"model": HASH}, {"model": [HASH, HASH]}, ("zlib", "ans"), records=1)
    with pytest.raises(PayloadError):
        check_hashes(holds, has, decoders, records=1)
