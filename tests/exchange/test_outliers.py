"""Updates far outside of the others': who is named, and who is not."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fedpara_plugins.exchange import Outliers
from fedpara_plugins.exchange.outliers import far_outside, update_norm


def named(norms, size=0.0):
    return sorted(far_outside({str(place): norm for place, norm in enumerate(norms)}, size))


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([1.0, 1.1, 0.9, 1e30], ["3"]),
        ([1.0, 1.1, 0.9, math.inf], ["3"]),
        ([0.0, 0.0, 0.0, 1e30], ["3"]),
        ([0.0, 0.0, 0.0, 0.0], []),
        ([1e30, 1.0, 1.2, 1e30], ["0", "3"]),  # half of them
        ([1.0, 1.0, 100.0], ["2"]),
        ([1.0, 100.0], []),  # says nothing
        ([1.0, 2.0, 4.0, 8.0], []),  # clients of very different sizes
        ([0.1, 0.3, 1.0, 3.0, 9.0], []),
        ([1.0] * 9 + [9.9], []),
        ([1.0] * 9 + [10.1], ["9"]),
    ],
)
def test_the_rule(norms, expected):
    assert named(norms) == expected


def test_a_client_may_learn_where_the_others_have_nothing_to_learn():
    assert named([0.0, 0.0, 0.0, 0.05], size=100.0) == []
    assert named([0.0, 0.0, 0.0, 0.2], size=100.0) == ["3"]


def test_a_minority_cannot_hide_itself_nor_accuse_others():
    draw = random.Random(0)
    for _ in range(2000):
        honest = [draw.lognormvariate(0, 0.5) for _ in range(6)]
        attackers = [10 ** draw.uniform(2, 300) for _ in range(draw.randint(1, 5))]
        found = named([*honest, *attackers])
        assert set(found) == {str(6 + place) for place in range(len(attackers))}


def test_a_norm_is_that_of_a_plain_computation():
    torch.manual_seed(0)
    sent = {"a": torch.randn(300_000), "b": torch.randn(3, 5).half(), "n": torch.tensor(3)}
    sent["m"] = torch.tensor([0.0, -math.inf])
    answer = {k: v + 1 for k, v in sent.items()}
    plain = sum(
        float(((answer[k].double() - sent[k].double()) ** 2)[: 1 if k == "m" else None].sum())
        for k in ("a", "b", "m")
    )
    assert update_norm(answer, sent) == pytest.approx(plain**0.5, rel=1e-12)
    assert update_norm({"a": torch.full((9,), 1e30)}) == pytest.approx(3e30)
    assert update_norm({"a": torch.full((1,), 1e300, dtype=torch.float64)}) == math.inf


def test_each_is_named_once_with_its_figures():
    round_ = Outliers()
    for client, norm in (("a", 1.0), ("b", 2.0), ("c", 1e30)):
        assert round_.reasons() == {}
        round_.add(client, norm, 5.0)
    (found,) = round_.reasons().items()
    assert found[0] == "c"
    assert "norm 1e+30" in found[1]
    assert "median is 1" in found[1]
    assert round_.reasons() == {}
    round_.discard("a")
    round_.add("d", 3e30, 5.0)
    assert round_.reasons() == {}  # two of three: no minority
