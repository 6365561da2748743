"""Metrics of the model, as strategies and clients report them, for the ledger."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import MetricRecord
from flwr.serverapp.strategy import Result

from fedpara_plugins import ConfigError
from fedpara_plugins_flower.run import Start, StartHook, active_run
from fedpara_plugins_flower.seams import EXAMPLES, LEGACY_EXAMPLES

__all__ = ["ClientMetrics", "log_metrics", "record_evaluations", "scalars"]

WEIGHTS = (EXAMPLES, LEGACY_EXAMPLES)


def log_metrics(server_round: int, /, **metrics: float) -> None:
    """Write metrics of the server's model to the run's ledger: ``log_metrics(3, accuracy=0.91)``.

    Only a ServerApp with a loop of its own needs it: the results of a strategy's ``evaluate_fn``
    and the metrics of clients' evaluations are written anyway. Without a ledger nothing happens.

    Args:
        server_round: the round after which they were measured; 0 is before any training.
        metrics: numbers by name.

    Raises:
        ConfigError: if it is called outside a run of the plugin, or on a client.
    """
    run = active_run()
    if run is None or run.side != "server":
        raise ConfigError(
            "fedpara: log_metrics() writes to the ledger of a run, which the server keeps: call it "
            "inside the main function of app = fedpara.server_app(ServerApp())"
        )
    if run.on_evaluated is not None:
        run.on_evaluated(server_round, metrics)


def scalars(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the single numbers in some metric records; lists are left out."""
    return {
        name: float(value)
        for record in records
        for name, value in record.items()
        if isinstance(value, int | float)
    }


class ClientMetrics:
    """The clients' metrics of one evaluation, and their mean.

    The mean is weighted by the examples that each client reports, as in Flower's strategies. If any
    client reports none, it is the unweighted mean.
    """

    def __init__(self) -> None:
        self._replies: list[dict[str, float]] = []

    def add(self, figures: dict[str, float]) -> None:
        """Add the metrics of one client."""
        self._replies.append(figures)

    def taken(self) -> dict[str, float]:
        """Return the means by name, and remove the clients' metrics."""
        replies, self._replies = self._replies, []
        weights = [next((r[key] for key in WEIGHTS if key in r), 0.0) for r in replies]
        if not all(weight > 0 for weight in weights):
            weights = [1.0] * len(replies)
        sums: dict[str, tuple[float, float]] = {}
        for reply, weight in zip(replies, weights, strict=True):
            for name, value in reply.items():
                if name not in WEIGHTS:
                    total, weight_sum = sums.get(name, (0.0, 0.0))
                    sums[name] = (total + weight * value, weight_sum + weight)
        return {name: total / weight_sum for name, (total, weight_sum) in sums.items()}


def record_evaluations(record: Callable[[int, Mapping[str, float]], None]) -> StartHook:
    """Return a hook that passes the metrics of a strategy's ``evaluate_fn`` to ``record``.

    Args:
        record: called with the round and its metrics.
    """

    @contextmanager
    def hook(start: Start) -> Iterator[Callable[[Result], Result]]:
        evaluate = start.get("evaluate_fn")
        if evaluate is not None:
            start["evaluate_fn"] = _recorded(evaluate, record)
        yield lambda result: result

    return hook


def _recorded(
    evaluate: Callable[..., Any], record: Callable[[int, Mapping[str, float]], None]
) -> Callable[..., Any]:
    @functools.wraps(evaluate)
    def evaluate_and_record(server_round: int, *args: Any, **kwargs: Any) -> Any:
        result = evaluate(server_round, *args, **kwargs)
        if isinstance(result, MetricRecord):
            record(server_round, scalars([result]))
        return result

    return evaluate_and_record
