"""Hooks around ``Strategy.start``, whatever the strategy.

Only the strategy itself knows which round it is, and what an ``evaluate_fn`` returned. The hooks
therefore get the documented arguments of ``start``. Outside a run that has hooks, the
method does what it did.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from fedpara_plugins_flower.run import Start, active_run
from fedpara_plugins_flower.seams import wrap_strategy_start

__all__ = ["install_start_hooks"]


def install_start_hooks() -> None:
    """Let every strategy that is started inside a run pass through the run's ``on_start``."""
    wrap_strategy_start(_with_hooks)


def _with_hooks(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def start(*args: Any, **kwargs: Any) -> Any:
        run = active_run()
        if run is None or not run.on_start:
            return original(*args, **kwargs)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return original(*args, **kwargs)  # whose own error says what is wrong
        bound.apply_defaults()
        arguments: Start = bound.arguments
        with ExitStack() as contexts:
            changes = [contexts.enter_context(hook(arguments)) for hook in run.on_start]
            result = original(**arguments)
            for change in reversed(changes):
                result = change(result)
        return result

    return start
