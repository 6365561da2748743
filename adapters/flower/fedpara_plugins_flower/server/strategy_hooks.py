"""Where the plugin takes part in ``Strategy.start``, whatever the strategy.

Flower tells nobody but the strategy itself what an ``evaluate_fn`` found or which round is on. Its
documented arguments are therefore looked at where ``start`` takes them; outside a run that asks for
it the method does what it did.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import ExitStack
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedpara_plugins_flower.run import Start, active_run

__all__ = ["follow_strategies"]


def follow_strategies() -> None:
    """Let every strategy that is started inside a run pass through the run's ``on_start``."""
    original = Strategy.start
    if hasattr(original, "_fedpara_follows"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
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
        with ExitStack() as around:
            changes = [around.enter_context(hook(arguments)) for hook in run.on_start]
            result = original(**arguments)
            for change in reversed(changes):
                result = change(result)
        return result

    start._fedpara_follows = True  # type: ignore[attr-defined]
    Strategy.start = start  # type: ignore[method-assign]
