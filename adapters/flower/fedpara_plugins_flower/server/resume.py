"""Rounds that survive: a server that is killed goes on after the last round it completed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.common import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.support import replace_file
from fedpara_plugins_flower.messages.records import to_record, to_tensors
from fedpara_plugins_flower.run import Start, active_run
from fedpara_plugins_flower.server.strategy_state import captured, pack, restore, unpack

__all__ = ["Rounds"]

log = logging.getLogger("flwr.fedpara")

METRICS = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)
"""Of Flower's `Result`: records by round."""

MODEL = "model/"

Method = Callable[..., Any]


@dataclass
class _Snapshot:
    """A completed round.

    Attributes:
        strategy: name of its class.
        round: its number.
        arrays: the global model.
        state: of the strategy, see `strategy_state`.
        first: the same before the first round.
        model: method and fingerprint of the converted model, "" for none.
        tensors: of ``state``.
    """

    strategy: str
    round: int
    arrays: dict[str, Tensor]
    state: dict[str, Any]
    first: dict[str, Any]
    model: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it."""
        words = {
            "strategy": self.strategy,
            "round": self.round,
            "state": self.state,
            "first": self.first,
            "model": self.model,
        }
        everything = {**{MODEL + k: v for k, v in self.arrays.items()}, **self.tensors}
        replace_file(path, encode_payload(everything, codec=parse_codec("none"), extra=words))

    @classmethod
    def read(cls, path: Path) -> _Snapshot | None:
        """What was written last; None if nothing was.

        Raises:
            ConfigError: the file is damaged.
        """
        if not path.exists():
            return None
        try:
            data = path.read_bytes()
            payload = decode_payload(data, limit=len(data))
            model = [name for name in payload.tensors if name.startswith(MODEL)]
            arrays = {name[len(MODEL) :]: payload.tensors.pop(name) for name in model}
            return cls(arrays=arrays, tensors=payload.tensors, **(payload.header.extra or {}))
        except (FedParaError, TypeError) as error:
            raise ConfigError(
                f"fedpara: {path} is damaged ({error}): remove it to begin at round 1 with what "
                f"clients hold, or choose another state-dir"
            ) from error


class Rounds:
    """Keeps each completed round of the strategies that an app starts, and goes on from there.

    Args:
        folder: for two files for each ``start`` of the app, in their order.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._started = 0

    @contextmanager
    def follow(self, start: Start) -> Iterator[Callable[[Result], Result]]:
        """To be around ``Strategy.start``.

        Raises:
            ConfigError: the folder holds rounds of another strategy or model.
        """
        path = self._folder / f"rounds-{self._started}.safetensors"
        self._started += 1
        following = _Following(start, path)
        with following.methods_wrapped():
            yield following.completed


class _Following:
    """One strategy's run."""

    def __init__(self, start: Start, path: Path) -> None:
        self._path = path
        self._strategy: Strategy = start["self"]
        self._tensors: dict[str, Tensor] = {}
        self._metrics_path = path.with_suffix(".metrics.json")
        self._metrics: dict[str, dict[str, Any]] = {name: {} for name in METRICS}
        self._first, lost = captured(self._strategy, {})
        if lost:
            log.warning(
                "fedpara: state-dir cannot keep %s of %s: a server that is killed begins with them "
                "anew",
                ", ".join(lost),
                type(self._strategy).__name__,
            )
        self._before = 0
        self._resume(start)
        self._evaluate = start.get("evaluate_fn")
        if self._evaluate is not None:
            start["evaluate_fn"] = self._evaluated

    def _resume(self, start: Start) -> None:
        saved = _Snapshot.read(self._path)
        if saved is None:
            return
        self._check_same(saved, start["initial_arrays"])
        restore(self._strategy, saved.state, saved.first, saved.tensors)
        self._first, self._before = saved.first, saved.round
        self._metrics |= _read_metrics(self._metrics_path)
        self._arrays = to_record(saved.arrays)
        if (run := active_run()) is not None:
            # What travels keeps the app's dtypes, whatever the strategy has made of them.
            run.dtypes = {k: v.dtype for k, v in to_tensors(start["initial_arrays"]).items()}
        log.info(
            "fedpara: %s holds round %d of %d: the run goes on after it, and Flower's own lines "
            "count from 1 again. For a new run choose another state-dir",
            self._path.parent,
            saved.round,
            start["num_rounds"],
        )
        start["initial_arrays"] = self._arrays
        start["num_rounds"] = max(0, start["num_rounds"] - saved.round)

    def _check_same(self, saved: _Snapshot, initial: ArrayRecord) -> None:
        here, there = type(self._strategy).__name__, saved.strategy
        if here != there:
            raise ConfigError(
                f"fedpara: {self._path.parent} holds rounds of {there}, this run starts {here}: "
                f"choose another state-dir"
            )
        now = _described(initial)
        if now != saved.model:
            raise ConfigError(
                f"fedpara: {self._path.parent} holds rounds of another model: it was converted "
                f"with {saved.model or 'method none'} there and {now or 'method none'} here; "
                f"choose another state-dir"
            )
        mine = {name: tuple(array.shape) for name, array in initial.items()}
        theirs = {name: tuple(value.shape) for name, value in saved.arrays.items()}
        unlike = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        if unlike:
            raise ConfigError(
                f"fedpara: {self._path.parent} holds rounds of another model: {unlike[0]!r} is "
                f"{theirs.get(unlike[0], 'not in it')} there and "
                f"{mine.get(unlike[0], 'not in it')} here; choose another state-dir"
            )

    # The strategy's rounds

    @contextmanager
    def methods_wrapped(self) -> Iterator[None]:
        """Count rounds on from the last one, and note each that is completed."""
        own = vars(self._strategy)
        wrapped = {
            "configure_train": self._counted(self._strategy.configure_train),
            "configure_evaluate": self._counted(self._strategy.configure_evaluate),
            "aggregate_train": self._aggregated(self._strategy.aggregate_train),
            "aggregate_evaluate": self._scored(self._strategy.aggregate_evaluate),
        }
        own.update(wrapped)
        try:
            yield
        finally:
            for name in wrapped:
                own.pop(name, None)

    def _counted(self, method: Method) -> Method:
        return lambda number, *args, **kwargs: method(number + self._before, *args, **kwargs)

    def _aggregated(self, method: Method) -> Method:
        def aggregate(number: int, *args: Any, **kwargs: Any) -> Any:
            arrays, metrics = method(number + self._before, *args, **kwargs)
            self._note("train_metrics_clientapp", number, metrics)
            if arrays is not None:
                self._keep(number + self._before, arrays)
            return arrays, metrics

        return aggregate

    def _scored(self, method: Method) -> Method:
        def aggregate(number: int, *args: Any, **kwargs: Any) -> Any:
            metrics = method(number + self._before, *args, **kwargs)
            self._note("evaluate_metrics_clientapp", number, metrics)
            return metrics

        return aggregate

    def _evaluated(self, number: int, *args: Any, **kwargs: Any) -> Any:
        if number == 0 and self._before:
            return None  # it was evaluated when it was reached
        metrics = self._evaluate(number + self._before, *args, **kwargs)  # type: ignore[misc]
        self._note("evaluate_metrics_serverapp", number, metrics)
        return metrics

    def _note(self, kind: str, number: int, metrics: object) -> None:
        if isinstance(metrics, MetricRecord):
            self._metrics[kind][str(number + self._before)] = pack(dict(metrics), {})
            try:
                replace_file(self._metrics_path, json.dumps(self._metrics).encode())
            except OSError as error:
                log.error("fedpara: metrics are not kept in %s: %s", self._metrics_path, error)

    def _keep(self, number: int, arrays: ArrayRecord) -> None:
        tensors: dict[str, Tensor] = {}
        state, _ = captured(self._strategy, tensors)
        name = type(self._strategy).__name__
        try:
            model = to_tensors(arrays)
            described = _described(model)
            snapshot = _Snapshot(name, number, model, state, self._first, described, tensors)
            snapshot.write(self._path)
        except (FedParaError, OSError) as error:
            log.error("fedpara: round %d is not kept in %s: %s", number, self._path, error)

    # The end

    def completed(self, result: Result) -> Result:
        """The result of all rounds, those before this process among them."""
        if self._before and not result.arrays:
            result.arrays = self._arrays
            if (run := active_run()) is not None and run.on_loaded is not None:
                run.on_loaded(to_tensors(self._arrays))  # for the checkpoint: nothing was sent
        for kind in METRICS:
            known = {int(k): MetricRecord(unpack(v, {})) for k, v in self._metrics[kind].items()}
            setattr(result, kind, dict(sorted(known.items())))
        return result


def _described(names: Iterable[str]) -> str:
    """How the model with these names was converted in this run; factors alone do not tell."""
    run = active_run()
    spec = None if run is None else run.specs.get(frozenset(names))
    if run is None or spec is None or not spec.weights:
        return ""
    return f"method {run.settings.config.method} (fingerprint {spec.fingerprint})"


def _read_metrics(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        log.warning("fedpara: the metrics of the rounds before are lost: %s is not there", path)
        return {}
    return {name: dict(found.get(name, {})) for name in METRICS}
