"""The server's state on disk: a killed server goes on after the last round that it completed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.exchange import pack_plain, unpack_plain
from fedpara_plugins.support import Outages, check_own_file, make_private_folder, replace_file
from fedpara_plugins_fedml.rules import State

__all__ = ["CompletedRound", "ServerFile"]

log = logging.getLogger("fedpara.fedml")

MODEL = "model/"


@dataclass(frozen=True)
class CompletedRound:
    """The server's knowledge after a round.

    Attributes:
        round: 1 for the first.
        x: its state.
        rule: state of the optimizer's rule.
        optimizer: its name.
        model: method and fingerprint of the converted model, "" for method none.
    """

    round: int
    x: State
    rule: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "FedAvg"
    model: str = ""


class ServerFile:
    """Keeps the last completed round in a file.

    Args:
        state_dir: the option of that name; None keeps nothing.
        outages: gets what cannot be written; None logs it alone.
    """

    def __init__(self, state_dir: Path | None, outages: Outages | None = None) -> None:
        self._outages = outages or Outages(log)
        self._path = None if state_dir is None else state_dir / "server" / "round.safetensors"

    def write(self, done: CompletedRound) -> None:
        """Keep a round in the place of the one before; if the disk refuses, the log says so."""
        if self._path is None:
            return
        tensors: dict[str, Tensor] = {}
        words = {
            "round": done.round,
            "rule": pack_plain(dict(done.rule), tensors),
            "optimizer": done.optimizer,
            "model": done.model,
        }
        everything = {**{MODEL + name: value for name, value in done.x.items()}, **tensors}
        try:
            make_private_folder(self._path.parent)
            data = encode_payload(everything, codec=parse_codec("none"), extra=words)
            replace_file(self._path, data, private=True)
        except FedParaError as error:
            log.error("fedpara: round %d is not kept in %s: %s", done.round, self._path, error)
        except OSError as error:
            so = "training goes on, and a restarted server begins after the last round kept"
            self._outages.note("completed rounds", self._path, error, so)

    def read(self, now: CompletedRound) -> CompletedRound | None:
        """Return what was kept last; None if nothing was.

        Args:
            now: what this run begins with, to compare.

        Raises:
            ConfigError: the file is damaged, or of another optimizer or model.
        """
        if self._path is None or not check_own_file(self._path):
            return None
        saved = self._decoded(self._path)
        where = f"fedpara: {self._path.parent} holds rounds of"
        if saved.optimizer != now.optimizer:
            raise ConfigError(
                f"{where} {saved.optimizer}, this run's federated_optimizer is {now.optimizer}: "
                f"choose another fedpara_state_dir"
            )
        if saved.model != now.model:
            raise ConfigError(
                f"{where} another model: it was converted with {saved.model or 'method none'} "
                f"there and {now.model or 'method none'} here; choose another fedpara_state_dir"
            )
        mine, theirs = _shapes(now.x), _shapes(saved.x)
        if unlike := [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]:
            raise ConfigError(
                f"{where} another model: {unlike[0]!r} is {theirs.get(unlike[0], 'not in it')} "
                f"there and {mine.get(unlike[0], 'not in it')} here; choose another "
                f"fedpara_state_dir"
            )
        return saved

    def _decoded(self, path: Path) -> CompletedRound:
        try:
            data = path.read_bytes()
            payload = decode_payload(data, limit=len(data))
            words = dict(payload.header.extra or {})
            x = {n[len(MODEL) :]: v for n, v in payload.tensors.items() if n.startswith(MODEL)}
            words["rule"] = unpack_plain(words["rule"], payload.tensors)
            found = CompletedRound(x=x, **words)
            _check_types(found)
            return found
        except (FedParaError, OSError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"fedpara: {path} is damaged ({error}): remove it to begin at round 1 with what "
                f"clients hold, or choose another fedpara_state_dir"
            ) from error


def _check_types(found: CompletedRound) -> None:
    for name, kind in {"round": int, "rule": dict, "optimizer": str, "model": str}.items():
        if type(getattr(found, name)) is not kind:
            raise TypeError(f"{name!r} is no {kind.__name__}")


def _shapes(x: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in x.items()}
