"""How good the model is, as strategies and clients find it, for the ledger."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.common import MetricRecord
from flwr.serverapp.strategy import Result

from fedpara_plugins import ConfigError
from fedpara_plugins_flower.run import Start, StartHook, active_run

__all__ = ["ClientMetrics", "log_metrics", "noting_evaluations", "scalars"]

WEIGHTS = ("num-examples", "num_examples")
"""What Flower's strategies weigh clients by unless told otherwise, and the legacy API's word."""


def log_metrics(server_round: int, /, **metrics: float) -> None:
    """Write figures of the server's model to the run's ledger: ``log_metrics(3, accuracy=0.91)``.

    Only for a ServerApp with a loop of its own: what the ``evaluate_fn`` of a strategy returns, and
    what clients answer when they evaluate, is written without it. Without a ledger nothing happens.

    Args:
        server_round: after which they were found; 0 is before any training.
        metrics: figures by name.

    Raises:
        ConfigError: called outside a run of the plugin, or on a client.
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
    """The single numbers of some metric records; lists are left out."""
    return {
        name: float(value)
        for record in records
        for name, value in record.items()
        if isinstance(value, int | float)
    }


class ClientMetrics:
    """The clients' own figures of one evaluation, and their mean.

    The mean is weighted by the examples that each client reports, as Flower's strategies do it; it
    is the plain mean if a client reports none.
    """

    def __init__(self) -> None:
        self._replies: list[dict[str, float]] = []

    def add(self, figures: dict[str, float]) -> None:
        """Take in the figures of one client."""
        self._replies.append(figures)

    def taken(self) -> dict[str, float]:
        """The means by name; forgets what they were made of."""
        replies, self._replies = self._replies, []
        weights = [next((r[key] for key in WEIGHTS if key in r), 0.0) for r in replies]
        if not all(weight > 0 for weight in weights):
            weights = [1.0] * len(replies)
        sums: dict[str, tuple[float, float]] = {}
        for reply, weight in zip(replies, weights, strict=True):
            for name, value in reply.items():
                if name not in WEIGHTS:
                    total, weighed = sums.get(name, (0.0, 0.0))
                    sums[name] = (total + weight * value, weighed + weight)
        return {name: total / weighed for name, (total, weighed) in sums.items()}


def noting_evaluations(note: Callable[[int, Mapping[str, float]], None]) -> StartHook:
    """Let ``note`` know what a strategy's ``evaluate_fn`` finds, by round."""

    @contextmanager
    def hook(start: Start) -> Iterator[Callable[[Result], Result]]:
        evaluate = start.get("evaluate_fn")
        if evaluate is not None:
            start["evaluate_fn"] = _noted(evaluate, note)
        yield lambda result: result

    return hook


def _noted(
    evaluate: Callable[..., Any], note: Callable[[int, Mapping[str, float]], None]
) -> Callable[..., Any]:
    @functools.wraps(evaluate)
    def evaluate_and_note(server_round: int, *args: Any, **kwargs: Any) -> Any:
        result = evaluate(server_round, *args, **kwargs)
        if isinstance(result, MetricRecord):
            note(server_round, scalars([result]))
        return result

    return evaluate_and_note
