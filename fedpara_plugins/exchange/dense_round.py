"""A client's round in which an ordinary dense model is trained instead of factors.

This is the option ``local = "dense"``. Messages, their encoding, the ledger and the kept state are
the same as with factors: only the client converts, when it creates a `DenseRound` and in its method
`after`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, MismatchError
from fedpara_plugins.exchange.conversion import convert_or_keep
from fedpara_plugins.factors.projection import project
from fedpara_plugins.models.spec import ModelSpec

__all__ = [
    "DenseRound",
    "converted_copy",
    "log_idle_options",
    "refuse_in_factor_space",
]

log = logging.getLogger("fedpara")

State = dict[str, Tensor]

IDLE = {"clip": "bounds gradients of factors", "speed": "is the speed of factors' steps"}
"""Options that act where factors are trained, and what they do there."""

_told: set[str] = set()


class DenseRound:
    """Conversion from a state of factors to the dense state that is trained, and back.

    Args:
        spec: of the model.
        full: the state of factors that the client starts from: shared values as received, and its
            own private values.

    Attributes:
        dense: what the client's model loads, with the names and shapes of the plain model.
        kept: by weight that has changed, the share of its update that the projection kept.
    """

    def __init__(self, spec: ModelSpec, full: Mapping[str, Tensor]) -> None:
        self._spec = spec
        self._full = {name: value.detach() for name, value in full.items()}
        self.dense = spec.dense_state(full)
        self.kept: dict[str, float] = {}

    def to_factors(self, trained: Mapping[str, Tensor]) -> State:
        """Return the state of factors that a dense state stands for after training.

        Composed weights are projected (`factors.projection.project`), private factors
        moving with the shared ones; everything else (biases, norms, dense layers, buffers) is taken
        as it is. If nothing has changed, the result is the state that the round began with.

        Args:
            trained: by the names of `dense`, or some of them; further names stay as they are.

        Raises:
            MismatchError: a weight has another shape, or holds no floating-point numbers.
        """
        found: State = {}
        for name, value in trained.items():
            if name not in self._spec.weights or name not in self.dense:
                found[name] = value
                continue
            self._check(name, value)
            keys = self._spec.factor_keys(name)
            factors = {factor: self._full[key] for factor, key in keys.items()}
            moved = project(self._spec.weights[name], factors, self.dense[name], value)
            if moved.kept is not None:
                self.kept[name] = moved.kept
            found.update({keys[factor]: new for factor, new in moved.factors.items()})
        if self.kept:
            shares = sorted(self.kept.values())
            log.debug(
                "fedpara: projected %d weights; kept share %.3f to %.3f",
                len(shares), shares[0], shares[-1],
            )  # fmt: skip
        return {key: found.pop(key) for key in self._spec.keys if key in found} | found

    def _check(self, name: str, value: Tensor) -> None:
        expected = self._spec.weights[name].shape
        if tuple(value.shape) != expected or not value.is_floating_point():
            raise MismatchError(
                f"local='dense': the client answers with {name!r} of shape {tuple(value.shape)} "
                f"and {value.dtype}, it was given floating-point numbers of shape {expected}: send "
                f"the state of the model that was trained"
            )


def converted_copy(model: nn.Module, config: FedParaConfig) -> nn.Module:
    """Return a plain model as factors; neither the model nor the random state is touched.

    Args:
        model: plain.
        config: how the server converts it.
    """
    with torch.random.fork_rng(devices=[]):
        return convert_or_keep(copy.deepcopy(model), config)


def refuse_in_factor_space(algorithm: str, config: FedParaConfig) -> None:
    """Raise for an optimizer whose clients correct gradients by the server's state of factors.

    Args:
        algorithm: its name.
        config: of the run.

    Raises:
        ConfigError: ``local`` is ``dense``.
    """
    if config.method != "none" and config.local == "dense":
        raise ConfigError(
            f"{algorithm} does not go with local='dense': it corrects the clients' gradients by "
            f"what the server has summed up, which is about factors, and the dense weights that "
            f"clients train have other gradients, most of which no factor can follow. Set "
            f"local='factors', or take FedAvg, FedProx or an optimizer of the server alone"
        )


def log_idle_options(config: FedParaConfig) -> None:
    """Log once which options have no effect."""
    for name, does in IDLE.items():
        if getattr(config, name) != getattr(FedParaConfig, name) and name not in _told:
            _told.add(name)
            log.info("fedpara: %s %s; with local='dense' clients train none", name, does)
