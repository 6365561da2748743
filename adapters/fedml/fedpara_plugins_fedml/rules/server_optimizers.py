"""The server's optimizers of FedOpt: from x and the clients' mean to the next x.

All of them use the pseudo-gradient g = x - mean, by name, in float64.

- `TorchOptimizer`: any class of ``torch.optim`` by its name, as in FedML.
- `Yogi`: as published (Reddi et al. 2021, arXiv 2003.00295, algorithm 2); torch does not have it.
- `CommonAdam`, `CommonYogi`, `CommonAdagrad`: the computations of Flower's strategies with these
  names, so that both frameworks can be set to one rule: ``fedpara_server_rule: flower``. Flower's
  FedAvgM is torch's SGD with momentum.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import State

__all__ = [
    "CommonAdagrad",
    "CommonAdam",
    "CommonYogi",
    "ServerOptimizer",
    "TorchOptimizer",
    "Yogi",
    "torch_optimizers",
]


class ServerOptimizer(ABC):
    """A server's optimizer with its state between rounds."""

    @abstractmethod
    def step(self, x: State, gradient: State) -> State:
        """Return the next values of all names, float64.

        Args:
            x: float64.
            gradient: x minus the clients' mean, float64.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""


def torch_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Return the classes of ``torch.optim`` that need a gradient alone, by lower-case name."""
    found = {
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    }
    return {
        name: kind
        for name, kind in sorted(found.items())
        if name not in ("lbfgs", "sparseadam", "muon")
    }


class TorchOptimizer(ServerOptimizer):
    """A class of ``torch.optim`` whose parameters are the server's.

    Args:
        kind: the class.
        options: of its constructor.

    Raises:
        ConfigError: if the class does not take such an option, or not that value.
    """

    def __init__(self, kind: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> None:
        self._kind = kind
        self._options = dict(options)
        self._parameters: dict[str, nn.Parameter] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._loaded: Mapping[str, State] = {}
        try:
            kind([nn.Parameter(torch.zeros(1))], **self._options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"server_optimizer {kind.__name__}: {error}") from None

    def step(self, x: State, gradient: State) -> State:
        """Return x after one step of the class."""
        optimizer = self._at(x)
        for name, parameter in self._parameters.items():
            parameter.data.copy_(x[name])
            parameter.grad = gradient[name].clone()
        optimizer.step()
        return {name: p.detach().clone() for name, p in self._parameters.items()}

    def _at(self, x: State) -> torch.optim.Optimizer:
        if self._optimizer is None:
            self._parameters = {name: nn.Parameter(value.clone()) for name, value in x.items()}
            self._optimizer = self._kind(list(self._parameters.values()), **self._options)
            for name, kept in self._loaded.items():
                if name in self._parameters:
                    self._optimizer.state[self._parameters[name]] = {
                        key: value.clone() for key, value in kept.items()
                    }
        return self._optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the class's state, by parameter."""
        if self._optimizer is None:
            return {"kept": {name: dict(kept) for name, kept in self._loaded.items()}}
        state = self._optimizer.state
        return {
            "kept": {
                name: {
                    key: torch.as_tensor(value).clone()
                    for key, value in state[parameter].items()
                    if value is not None
                }
                for name, parameter in self._parameters.items()
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; it takes effect at the next step."""
        self._loaded, self._optimizer = state["kept"], None


@dataclass
class _Adaptive(ServerOptimizer):
    """m = b1 m + (1 - b1) d,  v = second(v, d²),  x' = x + rate m / (sqrt(v) + tau),  d = -g."""

    lr: float
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    rounds: int = field(default=0, init=False)
    m: State = field(default_factory=dict, init=False)
    v: State = field(default_factory=dict, init=False)

    first_v = 0.0

    @abstractmethod
    def second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Return the next second moment."""

    def rate(self) -> float:
        """Return this round's learning rate."""
        return self.lr

    def step(self, x: State, gradient: State) -> State:
        """Return x after one step."""
        self.rounds += 1
        new = {}
        for name, value in x.items():
            d = -gradient[name]
            m = self.m.get(name, torch.zeros_like(d))
            v = self.v.get(name, torch.full_like(d, self.first_v))
            self.m[name] = self.beta_1 * m + (1 - self.beta_1) * d
            self.v[name] = self.second(v, d.square())
            new[name] = value + self.rate() * self.m[name] / (self.v[name].sqrt() + self.tau)
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return both moments and the number of rounds."""
        return {"rounds": self.rounds, "m": dict(self.m), "v": dict(self.v)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore both moments and the number of rounds."""
        self.rounds = int(state["rounds"])
        self.m, self.v = dict(state["m"]), dict(state["v"])


@dataclass
class Yogi(_Adaptive):
    """v - (1 - b2) d² sign(v - d²), from v = tau², the smallest value that the paper allows."""

    def __post_init__(self) -> None:
        self.first_v = self.tau**2

    def second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Return Yogi's second moment."""
        return v - (1 - self.beta_2) * square * (v - square).sign()


@dataclass
class CommonAdam(_Adaptive):
    """Flower's FedAdam: b2 v + (1 - b2) d², at the rate lr sqrt(1 - b2^t) / (1 - b1^t).

    t is the round's number plus 1.
    """

    def second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Return Adam's second moment."""
        return self.beta_2 * v + (1 - self.beta_2) * square

    def rate(self) -> float:
        """Return the bias-corrected learning rate."""
        t = self.rounds + 1
        rate: float = self.lr * (1 - self.beta_2**t) ** 0.5 / (1 - self.beta_1**t)
        return rate


@dataclass
class CommonYogi(Yogi):
    """Flower's FedYogi: as published, but v starts at zero."""

    def __post_init__(self) -> None:
        self.first_v = 0.0


@dataclass
class CommonAdagrad(_Adaptive):
    """Flower's FedAdagrad: v + d², and no momentum."""

    beta_1: float = 0.0

    def second(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Return Adagrad's second moment."""
        return v + square
