"""Users' functions that aggregate metrics in the legacy API: one client's metrics do not end them.

A legacy strategy gives the metrics of all clients to the user's function, which may rely on names
and kinds that one client does not send. The form that most clients send counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from fedpara_plugins_flower.logs import log

__all__ = ["guard_metrics"]

FUNCTIONS = ("fit_metrics_aggregation_fn", "evaluate_metrics_aggregation_fn")
MARK = "_fedpara_guarded"

Metrics = Sequence[tuple[int, Mapping[str, Any]]]
Aggregate = Callable[[Metrics], Any]


def guard_metrics(components: Any) -> None:
    """Let a legacy app's functions for metrics work without the metrics of other form.

    Args:
        components: what the app's ``server_fn`` returns.
    """
    server = getattr(components, "server", None)
    for strategy in (getattr(components, "strategy", None), getattr(server, "strategy", None)):
        for name in FUNCTIONS:
            function = getattr(strategy, name, None)
            if callable(function) and not hasattr(function, MARK):
                setattr(strategy, name, _guarded(function))


def _guarded(function: Aggregate) -> Aggregate:
    @wraps(function)
    def aggregate(metrics: Metrics) -> Any:
        try:
            return function(metrics)
        except Exception as error:
            usable = _alike(metrics)
            if not 0 < len(usable) < len(metrics):
                raise  # not one client's doing
            log.warning(
                "fedpara: the metrics of %d of %d clients differ from the others' in names or "
                "kinds, and are left out: the app's function fails with them (%s: %s)",
                len(metrics) - len(usable), len(metrics), type(error).__name__, error,
            )  # fmt: skip
            return function(usable)

    setattr(aggregate, MARK, True)
    return aggregate


def _alike(metrics: Metrics) -> list[tuple[int, Mapping[str, Any]]]:
    forms = [_form(values) for _, values in metrics]
    (best, count), *_ = Counter(forms).most_common(1)
    if 2 * count <= len(forms):
        return []
    return [one for one, form in zip(metrics, forms, strict=True) if form == best]


def _form(values: Mapping[str, Any]) -> frozenset[tuple[str, bool]]:
    return frozenset((str(name), isinstance(value, int | float)) for name, value in values.items())
