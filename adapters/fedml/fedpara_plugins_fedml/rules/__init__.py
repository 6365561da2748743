"""Federated optimizers by FedML's key ``federated_optimizer``, one file each."""

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
    LocalWork,
    Mean,
    Rule,
    State,
    Visit,
)
from fedpara_plugins_fedml.rules.fedavg import FedAvg
from fedpara_plugins_fedml.rules.feddyn import FedDyn, LocalFedDynRule
from fedpara_plugins_fedml.rules.fednova import FedNova, LocalFedNova
from fedpara_plugins_fedml.rules.fedopt import FedOpt, server_optimizer
from fedpara_plugins_fedml.rules.fedprox import FedProx, LocalFedProx
from fedpara_plugins_fedml.rules.keys import flag, number, text
from fedpara_plugins_fedml.rules.mime import LocalMime, Mime
from fedpara_plugins_fedml.rules.mime_statistics import Base
from fedpara_plugins_fedml.rules.scaffold import LocalScaffoldRule, Scaffold
from fedpara_plugins_fedml.settings import Settings

__all__ = [
    "RULES",
    "ClientReply",
    "LocalRule",
    "LocalWork",
    "Mean",
    "Rule",
    "State",
    "Visit",
    "local_rule_for",
    "rule_for",
]

ServerMaker = Callable[[Any, Settings, int], Rule]
LocalMaker = Callable[[Any, Settings], LocalRule]


def _weighting(settings: Settings) -> Weighting:
    """Uniform, as published, unless the user says otherwise."""
    return "examples" if settings.weighting == "examples" else "uniform"


def _scaffold(args: Any, settings: Settings, clients: int) -> Rule:
    return Scaffold(
        rate=number(args, "server_lr", 1.0),
        option="I" if settings.scaffold_option == "I" else "II",
        weighting=_weighting(settings),
        guard=settings.guard_for(default=True),
        clients=clients,
    )


def _feddyn(args: Any, settings: Settings, clients: int) -> Rule:
    return FedDyn(
        alpha=number(args, "feddyn_alpha", 0.1),
        weighting=_weighting(settings),
        guard=settings.guard_for(default=False),
        clients=clients,
    )


def _base(args: Any, settings: Settings) -> Base:
    given = {"beta_2": settings.server_beta_2, "tau": settings.server_tau}
    return Base(
        text(args, "server_optimizer", "sgd").lower(),
        beta_1=number(args, "server_momentum", 0.9)
        if settings.server_beta_1 is None
        else settings.server_beta_1,
        **{key: value for key, value in given.items() if value is not None},
    )


def _mime(args: Any, settings: Settings, clients: int) -> Rule:
    lite = flag(args, "mimelite")
    return Mime(_base(args, settings), lite=lite, weighting=_weighting(settings))


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
        lambda args, settings: LocalMime(_base(args, settings), lite=flag(args, "mimelite")),
    ),
}
"""Makers of both halves by name."""

IN_FACTOR_SPACE = ("SCAFFOLD", "FedDyn", "Mime")
"""Clients correct gradients by what the server has of factors."""


def rule_for(args: Any, settings: Settings, *, clients: int, a_round: int) -> Rule:
    """The server's half of the optimizer that the project names.

    Args:
        args: FedML's.
        settings: ours.
        clients: how many there are in all.
        a_round: how many are asked in a round.

    Raises:
        ConfigError: an optimizer that the plugin has not, or a bad value of a key of its own.
    """
    makers = _makers(args)
    _check_local(args, settings)
    return makers[0](args, settings, clients)


def local_rule_for(args: Any, settings: Settings) -> LocalRule:
    """The client's half of the same."""
    makers = _makers(args)
    _check_local(args, settings)
    return makers[1](args, settings)


def _check_local(args: Any, settings: Settings) -> None:
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
