"""Federated optimizers by FedML's key ``federated_optimizer``, one file each."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from fedpara_plugins import ConfigError
from fedpara_plugins_fedml.rules.base import Answer, LocalRule, LocalWork, Mean, Rule, State, Visit
from fedpara_plugins_fedml.rules.fedavg import FedAvg
from fedpara_plugins_fedml.settings import Settings

__all__ = [
    "RULES",
    "Answer",
    "LocalRule",
    "LocalWork",
    "Mean",
    "Rule",
    "State",
    "Visit",
    "local_rule_for",
    "rule_for",
]

ServerMaker = Callable[[Any, Settings, int, int], Rule]
LocalMaker = Callable[[Any, Settings], LocalRule]

RULES: dict[str, tuple[ServerMaker, LocalMaker]] = {
    "FedAvg": (
        lambda args, settings, clients, a_round: FedAvg(),
        lambda args, settings: LocalRule(),
    )
}
"""Makers of both halves by name."""


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
    return _makers(args)[0](args, settings, clients, a_round)


def local_rule_for(args: Any, settings: Settings) -> LocalRule:
    """The client's half of the same."""
    return _makers(args)[1](args, settings)


def _makers(args: Any) -> tuple[ServerMaker, LocalMaker]:
    name = str(getattr(args, "federated_optimizer", "FedAvg"))
    if name not in RULES:
        near = get_close_matches(name, RULES, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(
            f"federated_optimizer {name!r}: the plugin's engine has no such optimizer{hint} Known: "
            f"{', '.join(RULES)}"
        )
    return RULES[name]
