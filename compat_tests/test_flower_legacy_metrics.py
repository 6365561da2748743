"""One client's odd metrics do not end the app's function that aggregates them (legacy API)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedpara_plugins_flower.server.legacy_metrics import guard_metrics

GOOD = [(10, {"accuracy": 0.5}), (30, {"accuracy": 0.9})]


def average(metrics: Any) -> dict[str, float]:
    """Return the weighted mean, as Flower's examples write it."""
    total = sum(examples for examples, _ in metrics)
    return {"accuracy": sum(n * values["accuracy"] for n, values in metrics) / total}


def _guarded(function: Any) -> Any:
    strategy = SimpleNamespace(fit_metrics_aggregation_fn=function)
    components = SimpleNamespace(strategy=strategy, server=SimpleNamespace(strategy=strategy))
    guard_metrics(components)
    return strategy.fit_metrics_aggregation_fn


@pytest.mark.parametrize(
    "odd", [{}, {"accurracy": 0.1}, {"accuracy": "0.1"}, {"accuracy": b"x"}], ids=str
)
def test_what_the_function_cannot_use_is_left_out(
    odd: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    guarded = _guarded(average)
    assert guarded([*GOOD, (5, odd)]) == average(GOOD)
    assert "the metrics of 1 of 3 clients differ" in caplog.text


def test_the_functions_own_faults_stay_errors() -> None:
    guarded = _guarded(lambda metrics: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guarded(GOOD)
    with pytest.raises(KeyError):
        _guarded(average)([(1, {}), (1, {"accuracy": 1.0})])  # nobody is most of two


def test_what_it_can_use_it_gets() -> None:
    seen = []
    guarded = _guarded(seen.append)
    guarded([*GOOD, (5, {})])
    assert seen == [[*GOOD, (5, {})]]
