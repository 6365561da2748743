"""A strategy's last completed round on disk, and the metrics of all its rounds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from torch import Tensor

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.support import Outages, check_own_file, replace_file
from fedpara_plugins_flower.logs import log
from fedpara_plugins_flower.server.strategy_state import pack, unpack

__all__ = ["METRICS", "MetricsFile", "Snapshot"]

METRICS = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)
"""Attributes of Flower's `Result` that hold records by round."""

MODEL = "model/"


@dataclass
class Snapshot:
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
        """Replace the file.

        Raises:
            FedParaError: if the model holds what cannot be encoded.
            OSError: if the file cannot be written.
        """
        fields = {
            "strategy": self.strategy,
            "round": self.round,
            "state": self.state,
            "first": self.first,
            "model": self.model,
        }
        tensors = {**{MODEL + k: v for k, v in self.arrays.items()}, **self.tensors}
        data = encode_payload(tensors, codec=parse_codec("none"), extra=fields)
        replace_file(path, data, private=True)

    @classmethod
    def read(cls, path: Path) -> Snapshot | None:
        """Return the snapshot that was written last; None if there is no file.

        Raises:
            ConfigError: if the file is damaged, or is no file.
        """
        if not check_own_file(path):
            return None
        try:
            data = path.read_bytes()
            payload = decode_payload(data, limit=len(data))
            model = [name for name in payload.tensors if name.startswith(MODEL)]
            arrays = {name[len(MODEL) :]: payload.tensors.pop(name) for name in model}
            found = cls(arrays=arrays, tensors=payload.tensors, **(payload.header.extra or {}))
            found._check_types()
            return found
        except (FedParaError, OSError, TypeError) as error:
            raise ConfigError(
                f"fedpara: {path} is damaged ({error}): remove it to begin at round 1 with what "
                f"clients hold, or choose another state-dir"
            ) from error

    def _check_types(self) -> None:
        wanted = {"strategy": str, "round": int, "state": dict, "first": dict, "model": str}
        for name, kind in wanted.items():
            if type(getattr(self, name)) is not kind:
                raise TypeError(f"{name!r} is no {kind.__name__}")

    def check_matches(self, strategy: str, model: str, initial: ArrayRecord, where: Path) -> None:
        """Raise unless a run that is started now is of the same strategy and model.

        Args:
            strategy: name of its class.
            model: its method and fingerprint.
            initial: its first arrays.
            where: the folder, for the message.

        Raises:
            ConfigError: if it differs.
        """
        if strategy != self.strategy:
            raise ConfigError(
                f"fedpara: {where} holds rounds of {self.strategy}, this run starts {strategy}: "
                f"choose another state-dir"
            )
        if model != self.model:
            raise ConfigError(
                f"fedpara: {where} holds rounds of another model: it was converted "
                f"with {self.model or 'method none'} there and {model or 'method none'} here; "
                f"choose another state-dir"
            )
        mine = {name: tuple(array.shape) for name, array in initial.items()}
        theirs = {name: tuple(value.shape) for name, value in self.arrays.items()}
        unlike = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        if unlike:
            raise ConfigError(
                f"fedpara: {where} holds rounds of another model: {unlike[0]!r} is "
                f"{theirs.get(unlike[0], 'not in it')} there and "
                f"{mine.get(unlike[0], 'not in it')} here; choose another state-dir"
            )


class MetricsFile:
    """The metrics of a strategy's rounds, which Flower returns at the end of ``start``.

    Args:
        path: of the file.
        outages: gets what cannot be written.
    """

    def __init__(self, path: Path, outages: Outages) -> None:
        self._path = path
        self._outages = outages
        self._metrics: dict[str, dict[str, Any]] = {name: {} for name in METRICS}

    def read(self) -> None:
        """Read the metrics of the rounds before this process; log a warning if they are lost."""
        try:
            found = _by_kind(json.loads(self._path.read_bytes()))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            log.warning(
                "fedpara: the metrics of earlier rounds are lost: %s cannot be read: %s",
                self._path,
                error,
            )
            return
        self._metrics |= found

    def add(self, kind: str, number: int, metrics: object) -> None:
        """Add a round's metrics and write the file; anything but a MetricRecord is passed over."""
        if not isinstance(metrics, MetricRecord):
            return
        self._metrics[kind][str(number)] = pack(dict(metrics), {})
        try:
            replace_file(self._path, json.dumps(self._metrics).encode(), private=True)
        except OSError as error:
            so = "training goes on, and a server that is started again returns later ones alone"
            self._outages.note("metrics of the rounds", self._path, error, so)

    def by_round(self, kind: str) -> dict[int, MetricRecord]:
        """Return the records of one of `METRICS`, in the order of rounds."""
        found = {int(k): MetricRecord(unpack(v, {})) for k, v in self._metrics[kind].items()}
        return dict(sorted(found.items()))


def _by_kind(found: Any) -> dict[str, dict[str, Any]]:
    """Return metrics by kind and round, as `MetricsFile` writes them.

    Raises:
        ValueError, TypeError: they are something else.
    """
    if not isinstance(found, dict):
        raise TypeError("not an object")
    kinds = {name: dict(found.get(name, {})) for name in METRICS}
    for rounds in kinds.values():
        for number, values in rounds.items():
            int(number)
            MetricRecord(unpack(values, {}))
    return kinds
