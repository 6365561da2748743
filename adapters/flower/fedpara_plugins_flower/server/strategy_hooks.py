"""Hooks around ``Strategy.start``, whatever the strategy.

Only the strategy itself knows which round it is, and what an ``evaluate_fn`` returned. The hooks
therefore get the documented arguments of ``start``, also of one that a strategy has written anew.
Outside a run that has hooks, the method does what it did.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from flwr.serverapp.strategy import Result

from fedpara_plugins_flower.logs import log
from fedpara_plugins_flower.run import Run, Start, active_run
from fedpara_plugins_flower.seams import wrap_strategy_start

__all__ = ["install_start_hooks", "log_own_loop"]

WANTED = ("self", "grid", "initial_arrays", "num_rounds")
"""Arguments of ``start`` that the hooks rely on."""


def install_start_hooks() -> None:
    """Let every strategy that is started inside a run pass through the run's ``on_start``.

    Strategies with a ``start`` of their own do too, if their class exists by now.
    """
    wrap_strategy_start(_with_hooks)


def _with_hooks(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def start(*args: Any, **kwargs: Any) -> Any:
        run = active_run()
        if run is None or not run.on_start or run.starting:
            return original(*args, **kwargs)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return original(*args, **kwargs)  # whose own error says what is wrong
        bound.apply_defaults()
        arguments: Start = bound.arguments
        if not set(WANTED) <= set(arguments):
            return original(*args, **kwargs)  # which may call the inherited one
        run.starting = True  # a start of its own may call the inherited one
        try:
            with ExitStack() as contexts:
                changes = [contexts.enter_context(hook(arguments)) for hook in run.on_start]
                result = original(*bound.args, **bound.kwargs)
                for change in reversed(changes) if isinstance(result, Result) else ():
                    result = change(result)
            return result
        finally:
            run.starting = False

    return start


def log_own_loop(run: Run) -> None:
    """Log once what is missing where an app sends messages and no strategy was started.

    Args:
        run: on the server.
    """
    if run.starting or run.own_loop_told or run.strategy is not None or not run.on_start:
        return
    run.own_loop_told = True
    if run.settings.state_dir is not None or run.settings.ledger is not None:
        log.info(
            "fedpara: the app has rounds of its own, no Strategy.start with Flower's arguments: "
            "state-dir keeps no rounds of it, and the ledger gets what the server evaluates from "
            "fedpara.log_metrics(...) alone"
        )
