"""Log lines at the beginning of a run: whether the plugin's engine runs, and what that changes."""

from __future__ import annotations

from typing import Any

from fedpara_plugins.exchange import codecs_in_words
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.rules import Rule
from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = ["log_engine", "warn_about_files"]

HOOKS = {
    "enable_dp": "differential privacy",
    "enable_attack": "the attack",
    "enable_defense": "the defence",
}


def log_engine(settings: FedMLSettings, args: Any, rule: Rule, *, used: list[str]) -> None:
    """Log that the plugin's engine runs, and what it does otherwise than FedML.

    Args:
        settings: of the run.
        args: FedML's.
        rule: of the optimizer.
        used: arguments of the runner that are used here, and that FedML ignores in this mode.
    """
    differs = [rule.differs] if rule.differs else []
    if used:
        differs.append(f"your {' and '.join(used)} {_is(used)} used, which FedML ignores")
    acting = [text for key, text in HOOKS.items() if getattr(args, key, False)]
    if acting:
        differs.append(f"{' and '.join(acting)} {_is(acting)} applied, which FedML leaves out")
    log.info(
        "fedpara: the plugin's engine runs %s: method %s, codec %s. Differences from FedML's "
        "own single process: %s",
        rule.name, settings.config.method, codecs_in_words(settings.codec_names),
        "; ".join(differs) or "nothing",
    )  # fmt: skip


def warn_about_files(settings: FedMLSettings) -> None:
    """Warn that options about files have no effect where FedML's own code runs."""
    names = ("ledger", "checkpoint", "client_checkpoints", "state_dir")
    unused = [f"fedpara_{name}" for name in names if getattr(settings, name) is not None]
    if unused:
        log.warning(
            "fedpara: %s %s without effect: with method and codec none FedML's own code runs. Set "
            "fedpara_mend: true for the plugin's engine",
            ", ".join(unused), _is(unused),
        )  # fmt: skip


def _is(what: list[str]) -> str:
    return "are" if len(what) > 1 else "is"
