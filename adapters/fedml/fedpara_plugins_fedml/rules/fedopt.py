"""FedOpt (Reddi et al. 2021, arXiv 2003.00295): a server optimizer on the pseudo-gradient x - mean.

Keys: ``server_optimizer``, ``server_lr``, ``server_momentum`` (FedML's), and of the plugin
``fedpara_server_rule``, ``fedpara_server_beta_1``, ``fedpara_server_beta_2``,
``fedpara_server_tau``. Which class computes what: `fedpara_plugins_fedml.rules.server_optimizers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from fedpara_plugins import ConfigError
from fedpara_plugins.models import diverged
from fedpara_plugins.optimizers import subtract
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
from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = ["FedOpt", "server_optimizer"]

COMMON: Mapping[str, Callable[..., ServerOptimizer]] = {
    "adagrad": CommonAdagrad, "adam": CommonAdam, "yogi": CommonYogi,
}  # fmt: skip


class FedOpt(Rule):
    """The server's part; clients need none.

    Args:
        optimizer: of the parameters that are trained and shared; buffers are averaged.
    """

    name = "FedOpt"
    differs = "FedML lets the clients of every round train on each other's result"

    def __init__(self, optimizer: ServerOptimizer) -> None:
        self.optimizer = optimizer

    def step(self, x: State, replies: Sequence[ClientReply], mean: Mean) -> State:
        """Return x after one step of the server's optimizer."""
        average = mean(replies)
        if any(diverged(average[name], x[name]) for name in self.trained if name in average):
            return average  # the engine then keeps x; the optimizer's state must not change
        wide = {name: x[name].to(torch.float64) for name in x if name in self.trained}
        gradient = subtract(wide, {name: average[name].to(torch.float64) for name in wide})
        new = self.optimizer.step(wide, gradient)
        return {name: new[name].to(x[name].dtype) if name in new else average[name] for name in x}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the optimizer's state."""
        self.optimizer.load_state_dict(state["optimizer"])


def server_optimizer(args: Any, settings: FedMLSettings) -> ServerOptimizer:
    """Return the optimizer that a project's keys name.

    Args:
        args: FedML's.
        settings: of the run.

    Raises:
        ConfigError: if the name is unknown, or a value is out of range.
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
    return TorchOptimizer(known[name], _torch_options(known[name], lr, momentum, settings))


def _torch_options(
    kind: type[torch.optim.Optimizer], lr: float, momentum: float, settings: FedMLSettings
) -> dict[str, Any]:
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
    return options


def _common(name: str, lr: float, momentum: float, settings: FedMLSettings) -> ServerOptimizer:
    if name == "sgd":
        return TorchOptimizer(torch.optim.SGD, {"lr": lr, "momentum": momentum})
    if name not in COMMON:
        raise ConfigError(_unknown(name, ["sgd", *COMMON]) + " (fedpara_server_rule: flower)")
    return COMMON[name](lr, **_given(settings))


def _given(settings: FedMLSettings) -> dict[str, float]:
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
