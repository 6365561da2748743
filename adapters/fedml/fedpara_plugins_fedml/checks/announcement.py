"""One line in the log: that the plugin's engine runs, why, and what differs from FedML's own."""

from __future__ import annotations

import logging
from typing import Any

from fedpara_plugins.exchange import codecs_in_words
from fedpara_plugins_fedml.rules import Rule
from fedpara_plugins_fedml.settings import Settings

__all__ = ["announce", "warn_of_idle_files"]

log = logging.getLogger("fedpara.fedml")

HOOKS = {
    "enable_dp": "differential privacy",
    "enable_attack": "the attack",
    "enable_defense": "the defence",
}


def announce(settings: Settings, args: Any, rule: Rule, *, honoured: list[str]) -> None:
    """Say it.

    Args:
        settings: of the run.
        args: FedML's.
        rule: of the optimizer.
        honoured: what the user gave that FedML's mode would have ignored.
    """
    differs = [rule.mends] if rule.mends else []
    if honoured:
        differs.append(f"your {' and '.join(honoured)} {_is(honoured)} used, which FedML ignores")
    acting = [word for key, word in HOOKS.items() if getattr(args, key, False)]
    if acting:
        differs.append(f"{' and '.join(acting)} {_is(acting)} applied, which FedML leaves out")
    log.info(
        "fedpara: the plugin's engine runs %s: method %s, codec %s. Other than in FedML's own "
        "single process: %s",
        rule.name, settings.config.method, codecs_in_words(settings.codec_names),
        "; ".join(differs) or "nothing",
    )  # fmt: skip


def warn_of_idle_files(settings: Settings) -> None:
    """Say that options about files have no effect where FedML's own code runs."""
    names = ("ledger", "checkpoint", "client_checkpoints", "state_dir")
    idle = [f"fedpara_{name}" for name in names if getattr(settings, name) is not None]
    if idle:
        log.warning(
            "fedpara: %s %s without effect: with method and codec none FedML's own code runs. Set "
            "fedpara_mend: true for the plugin's engine",
            ", ".join(idle), _is(idle),
        )  # fmt: skip


def _is(what: list[str]) -> str:
    return "are" if len(what) > 1 else "is"
