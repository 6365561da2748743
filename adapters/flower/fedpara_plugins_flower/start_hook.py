"""What takes part when a strategy is started, as a type; `strategy_start` calls it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from flwr.serverapp.strategy import Result

__all__ = ["Start", "StartHook"]

Start: TypeAlias = dict[str, Any]
"""The arguments of ``start`` by name, ``self`` among them; a hook may replace them."""

StartHook: TypeAlias = Callable[[Start], AbstractContextManager[Callable[[Result], Result]]]
"""Is around a strategy's run, and gives a function that may change its result."""
