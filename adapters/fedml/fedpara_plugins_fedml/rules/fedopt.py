"""FedOpt (Reddi et al. 2021, arXiv 2003.00295): a server optimizer on the pseudo-gradient x - mean.

Keys: ``server_optimizer``, ``server_lr``, ``server_momentum`` (FedML's), and of the plugin
``fedpara_server_rule``, ``fedpara_server_beta_1``, ``fedpara_server_beta_2``,
``fedpara_server_tau``. Which class computes what: `fedpara_plugins_fedml.rules.server_optimizers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import finite
from fedpara_plugins_fedml.rules.base import ClientReply, Mean, Rule, State
from fedpara_plugins_fedml.rules.keys import number, text
from fedpara_plugins_fedml.rules.server_optimizers import (
    CommonAdagrad,
    CommonAdam,
    CommonYogi,
    ServerOptimizer,
    TorchOptimizer,
    Yogi,
    torch_optimizers,
)
from fedpara_plugins_fedml.settings import Settings

__all__ = ["FedOpt", "server_optimizer"]

COMMON = {"adagrad": CommonAdagrad, "adam": CommonAdam, "yogi": CommonYogi}


class FedOpt(Rule):
    """The server's half; clients just train.

    Args:
        optimizer: of the parameters that are trained and shared; buffers are averaged.
    """

    name = "FedOpt"
    mends = "FedML lets the clients of every round train on each other's result"

    def __init__(self, optimizer: ServerOptimizer) -> None:
        self.optimizer = optimizer

    def step(self, x: State, answers: Sequence[ClientReply], mean: Mean) -> State:
        """One step of the server's optimizer."""
        average = mean(answers)
        if not finite(average.values()):
            return average  # the engine keeps x; the optimizer must not take this in
        wide = {name: x[name].to(torch.float64) for name in x if name in self.trained}
        gradient = {name: value - average[name].to(torch.float64) for name, value in wide.items()}
        new = self.optimizer.step(wide, gradient)
        return {name: new[name].to(x[name].dtype) if name in new else average[name] for name in x}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])


def server_optimizer(args: Any, settings: Settings) -> ServerOptimizer:
    """What the keys ask for.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """
    name = text(args, "server_optimizer", "sgd").lower()
    plain = name in ("sgd", "asgd")
    lr = number(args, "server_lr", 1.0 if plain else 0.01)
    momentum = number(args, "server_momentum", 0.0)
    if settings.server_rule == "flower":
        return _common(name, lr, momentum, settings)
    if name == "yogi":
        return Yogi(lr, **_given(settings))
    known = torch_optimizers()
    if name not in known:
        raise ConfigError(_unknown(name, [*known, "yogi"]))
    kind = known[name]
    taken = inspect.signature(kind.__init__).parameters
    options: dict[str, Any] = {"lr": lr}
    if "momentum" in taken:
        options["momentum"] = momentum
    if "betas" in taken:
        first, second = taken["betas"].default
        b1, b2 = settings.server_beta_1, settings.server_beta_2
        options["betas"] = (first if b1 is None else b1, second if b2 is None else b2)
    if "eps" in taken and settings.server_tau is not None:
        options["eps"] = settings.server_tau
    return TorchOptimizer(kind, options)


def _common(name: str, lr: float, momentum: float, settings: Settings) -> ServerOptimizer:
    if name == "sgd":
        return TorchOptimizer(torch.optim.SGD, {"lr": lr, "momentum": momentum})
    if name not in COMMON:
        raise ConfigError(_unknown(name, ["sgd", *COMMON]) + " (fedpara_server_rule: flower)")
    return COMMON[name](lr, **_given(settings))


def _given(settings: Settings) -> dict[str, float]:
    values = {
        "beta_1": settings.server_beta_1,
        "beta_2": settings.server_beta_2,
        "tau": settings.server_tau,
    }
    return {key: value for key, value in values.items() if value is not None}


def _unknown(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"server_optimizer {name!r} is not known{hint} Known: {', '.join(known)}"
