"""Runs that survive a killed server: a new process continues after the last completed round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.support import Outages, make_private_folder
from fedpara_plugins_flower.logs import log
from fedpara_plugins_flower.messages.records import to_record, to_tensors
from fedpara_plugins_flower.run import Start, active_run
from fedpara_plugins_flower.seams import replaced_methods
from fedpara_plugins_flower.server.snapshot import METRICS, MetricsFile, Snapshot
from fedpara_plugins_flower.server.strategy_state import capture, restore

__all__ = ["ResumableRounds"]

Method = Callable[..., Any]

ROUNDS = "completed rounds"
NOT_KEPT = "training goes on, and a restarted server begins after the last round kept"


class ResumableRounds:
    """Saves each completed round of the strategies that an app starts, and continues from there.

    Args:
        folder: receives two files for each ``start`` of the app, numbered in their order.
        outages: gets what cannot be written.

    Raises:
        ConfigError: something else is in the folder's place.
    """

    def __init__(self, folder: Path, outages: Outages) -> None:
        self._folder = folder
        self._outages = outages
        self._started = 0
        try:
            make_private_folder(folder)
        except OSError as error:
            outages.note(ROUNDS, folder, error, NOT_KEPT)

    @contextmanager
    def around_start(self, start: Start) -> Iterator[Callable[[Result], Result]]:
        """Save and resume the rounds of one ``Strategy.start``; a `StartHook`.

        Raises:
            ConfigError: if the folder holds rounds of another strategy or model.
        """
        path = self._folder / f"rounds-{self._started}.safetensors"
        self._started += 1
        run = _StrategyRun(start, path, self._outages)
        with replaced_methods(start["self"], run.methods()):
            yield run.completed


class _StrategyRun:
    """The rounds of one strategy, those before this process included."""

    def __init__(self, start: Start, path: Path, outages: Outages) -> None:
        self._path = path
        self._outages = outages
        self._strategy: Strategy = start["self"]
        self._metrics = MetricsFile(path.with_suffix(".metrics.json"), outages)
        self._first, lost = capture(self._strategy, {})
        if lost:
            log.warning(
                "fedpara: state-dir cannot keep %s of %s: a restarted server begins without them",
                ", ".join(lost),
                type(self._strategy).__name__,
            )
        self._before = 0
        self._resume(start)
        self._evaluate = start.get("evaluate_fn")
        if self._evaluate is not None:
            start["evaluate_fn"] = self._evaluated

    def _resume(self, start: Start) -> None:
        saved = Snapshot.read(self._path)
        if saved is None:
            return
        initial, name = start["initial_arrays"], type(self._strategy).__name__
        saved.check_matches(name, _described(initial), initial, self._path.parent)
        try:
            restore(self._strategy, saved.state, saved.first, saved.tensors)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"fedpara: {self._path} holds a state that {name} cannot take ({error!r}): remove "
                f"the file to begin at round 1, or choose another state-dir"
            ) from error
        self._first, self._before = saved.first, saved.round
        self._metrics.read()
        self._arrays = to_record(saved.arrays)
        if (run := active_run()) is not None:
            # Messages keep the app's dtypes, whatever the strategy has made of them.
            run.dtypes = {k: v.dtype for k, v in to_tensors(initial).items()}
        log.info(
            "fedpara: %s holds round %d of %d: the run goes on after it, and Flower's own lines "
            "count from 1 again. For a new run choose another state-dir",
            self._path.parent,
            saved.round,
            start["num_rounds"],
        )
        start["initial_arrays"] = self._arrays
        start["num_rounds"] = max(0, start["num_rounds"] - saved.round)

    # The strategy's rounds

    def methods(self) -> dict[str, Method]:
        """Return the methods that take the strategy's place.

        They count rounds from the last one of the process before, and save each completed round.
        """
        return {
            "configure_train": self._counted(self._strategy.configure_train),
            "configure_evaluate": self._counted(self._strategy.configure_evaluate),
            "aggregate_train": self._aggregated(self._strategy.aggregate_train),
            "aggregate_evaluate": self._scored(self._strategy.aggregate_evaluate),
        }

    def _counted(self, method: Method) -> Method:
        return lambda number, *args, **kwargs: method(number + self._before, *args, **kwargs)

    def _aggregated(self, method: Method) -> Method:
        def aggregate(number: int, *args: Any, **kwargs: Any) -> Any:
            number += self._before
            arrays, metrics = method(number, *args, **kwargs)
            self._metrics.add("train_metrics_clientapp", number, metrics)
            if arrays is not None:
                self._save(number, arrays)
            return arrays, metrics

        return aggregate

    def _scored(self, method: Method) -> Method:
        def aggregate(number: int, *args: Any, **kwargs: Any) -> Any:
            number += self._before
            metrics = method(number, *args, **kwargs)
            self._metrics.add("evaluate_metrics_clientapp", number, metrics)
            return metrics

        return aggregate

    def _evaluated(self, number: int, *args: Any, **kwargs: Any) -> Any:
        if number == 0 and self._before:
            return None  # the model was evaluated by the process before
        number += self._before
        metrics = self._evaluate(number, *args, **kwargs)  # type: ignore[misc]
        self._metrics.add("evaluate_metrics_serverapp", number, metrics)
        return metrics

    def _save(self, number: int, arrays: ArrayRecord) -> None:
        tensors: dict[str, Tensor] = {}
        state, _ = capture(self._strategy, tensors)
        name = type(self._strategy).__name__
        try:
            model = to_tensors(arrays)
            described = _described(model)
            snapshot = Snapshot(name, number, model, state, self._first, described, tensors)
            snapshot.write(self._path)
        except FedParaError as error:
            log.error("fedpara: round %d is not kept in %s: %s", number, self._path, error)
        except OSError as error:
            self._outages.note(ROUNDS, self._path, error, NOT_KEPT)

    # The end

    def completed(self, result: Result) -> Result:
        """Return the result of all rounds, those before this process included."""
        if self._before and not result.arrays:
            result.arrays = self._arrays
            if (run := active_run()) is not None and run.on_loaded is not None:
                run.on_loaded(to_tensors(self._arrays))  # for the checkpoint: nothing was sent
        for kind in METRICS:
            setattr(result, kind, self._metrics.by_round(kind))
        return result


def _described(names: Iterable[str]) -> str:
    """Return how this run converted the model with these names; factors alone do not show it."""
    run = active_run()
    spec = None if run is None else run.specs.get(frozenset(names))
    if run is None or spec is None or not spec.weights:
        return ""
    return f"method {run.settings.config.method} (fingerprint {spec.fingerprint})"
