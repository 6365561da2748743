"""Federated optimizers by FedML's key ``federated_optimizer``, one file each.

Imports: the root modules (``settings``, ``seams``, ``logs``) and the core, which has the arithmetic
(`fedpara_plugins.optimizers`).
Offers: `rule_for` and `local_rule_for`, the server's and the client's part of the optimizer that a
project names, and the types of their interface.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from fedpara_plugins import ConfigError
from fedpara_plugins.exchange import refuse_in_factor_space
from fedpara_plugins.optimizers import Weighting
from fedpara_plugins_fedml.rules.base import (
    ClientReply,
    LocalRule,
    Mean,
    ReplyExtras,
    RoundContext,
    Rule,
    State,
)
from fedpara_plugins_fedml.rules.fedavg import FedAvg
from fedpara_plugins_fedml.rules.feddyn import FedDyn, LocalFedDynRule
from fedpara_plugins_fedml.rules.fednova import FedNova, LocalFedNova
from fedpara_plugins_fedml.rules.fedopt import FedOpt, server_optimizer
from fedpara_plugins_fedml.rules.fedprox import FedProx, LocalFedProx
from fedpara_plugins_fedml.rules.keys import flag, number, text
from fedpara_plugins_fedml.rules.mime import LocalMime, Mime
from fedpara_plugins_fedml.rules.mime_statistics import BaseAlgorithm
from fedpara_plugins_fedml.rules.scaffold import LocalScaffoldRule, Scaffold
from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = [
    "RULES",
    "ClientReply",
    "LocalRule",
    "Mean",
    "ReplyExtras",
    "RoundContext",
    "Rule",
    "State",
    "local_rule_for",
    "rule_for",
]

ServerMaker = Callable[[Any, FedMLSettings, int], Rule]
LocalMaker = Callable[[Any, FedMLSettings], LocalRule]


def _weighting(settings: FedMLSettings) -> Weighting:
    """Return ``uniform``, as published, unless the user sets ``examples``."""
    return "examples" if settings.weighting == "examples" else "uniform"


def _scaffold(args: Any, settings: FedMLSettings, clients: int) -> Rule:
    return Scaffold(
        rate=number(args, "server_lr", 1.0),
        option="I" if settings.scaffold_option == "I" else "II",
        weighting=_weighting(settings),
        guard=settings.guard_for(default=True),
        clients=clients,
    )


def _feddyn(args: Any, settings: FedMLSettings, clients: int) -> Rule:
    return FedDyn(
        alpha=number(args, "feddyn_alpha", 0.1),
        weighting=_weighting(settings),
        guard=settings.guard_for(default=False),
        clients=clients,
    )


def _base_algorithm(args: Any, settings: FedMLSettings) -> BaseAlgorithm:
    given = {"beta_2": settings.server_beta_2, "tau": settings.server_tau}
    return BaseAlgorithm(
        text(args, "server_optimizer", "sgd").lower(),
        beta_1=number(args, "server_momentum", 0.9)
        if settings.server_beta_1 is None
        else settings.server_beta_1,
        **{key: value for key, value in given.items() if value is not None},
    )


def _mime(args: Any, settings: FedMLSettings, clients: int) -> Rule:
    lite = flag(args, "mimelite")
    return Mime(_base_algorithm(args, settings), lite=lite, weighting=_weighting(settings))


def _local_mime(args: Any, settings: FedMLSettings) -> LocalRule:
    return LocalMime(_base_algorithm(args, settings), lite=flag(args, "mimelite"))


RULES: dict[str, tuple[ServerMaker, LocalMaker]] = {
    "FedAvg": (
        lambda args, settings, clients: FedAvg(),
        lambda args, settings: LocalRule(),
    ),
    "FedProx": (
        lambda args, settings, clients: FedProx(),
        lambda args, settings: LocalFedProx(number(args, "fedprox_mu", 0.1)),
    ),
    "FedOpt": (
        lambda args, settings, clients: FedOpt(server_optimizer(args, settings)),
        lambda args, settings: LocalRule(),
    ),
    "SCAFFOLD": (_scaffold, lambda args, settings: LocalScaffoldRule()),
    "FedDyn": (_feddyn, lambda args, settings: LocalFedDynRule()),
    "FedNova": (
        lambda args, settings, clients: FedNova(
            gmf=number(args, "gmf", 0.0), mu=number(args, "mu", 0.0)
        ),
        lambda args, settings: LocalFedNova.of(args),
    ),
    "Mime": (
        _mime,
        _local_mime,
    ),
}
"""Constructors of the server's and the client's part, by name."""

IN_FACTOR_SPACE = ("SCAFFOLD", "FedDyn", "Mime")
"""Optimizers whose clients correct gradients by the server's tensors of factors."""


def rule_for(args: Any, settings: FedMLSettings, *, clients: int) -> Rule:
    """Return the server's part of the optimizer that a project names.

    Args:
        args: FedML's.
        settings: of the run.
        clients: number of all clients.

    Raises:
        ConfigError: if the plugin does not have the optimizer, or one of its keys has a bad value.
    """
    makers = _makers(args)
    _check_local(args, settings)
    return makers[0](args, settings, clients)


def local_rule_for(args: Any, settings: FedMLSettings) -> LocalRule:
    """Return the client's part of the optimizer that a project names.

    Args:
        args: FedML's.
        settings: of the run.

    Raises:
        ConfigError: if the plugin does not have the optimizer, or one of its keys has a bad value.
    """
    makers = _makers(args)
    _check_local(args, settings)
    return makers[1](args, settings)


def _check_local(args: Any, settings: FedMLSettings) -> None:
    name = str(getattr(args, "federated_optimizer", "FedAvg"))
    if name in IN_FACTOR_SPACE:
        refuse_in_factor_space(name, settings.config)


def _makers(args: Any) -> tuple[ServerMaker, LocalMaker]:
    name = str(getattr(args, "federated_optimizer", "FedAvg"))
    if name not in RULES:
        by_text = {known.lower(): known for known in RULES}
        near = get_close_matches(name.lower(), by_text, n=1)
        hint = f"; did you mean {by_text[near[0]]}?" if near else "."
        raise ConfigError(
            f"federated_optimizer {name!r}: the plugin's engine has no such optimizer{hint} Known: "
            f"{', '.join(RULES)}"
        )
    return RULES[name]
