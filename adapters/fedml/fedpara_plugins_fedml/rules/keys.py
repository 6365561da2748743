"""FedML's own keys of optimizers, with defaults where FedML would fail on a missing key."""

from __future__ import annotations

import math
from typing import Any

from fedpara_plugins import ConfigError

__all__ = ["flag", "number", "text"]


def number(args: Any, key: str, default: float, *, least: float = 0.0) -> float:
    """Return a key's value, a finite number of ``least`` or more.

    Raises:
        ConfigError: if it has another value; names the key and the value.
    """
    value = getattr(args, key, None)
    if value is None:
        return default
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not (math.isfinite(found) and found >= least):
        raise ConfigError(f"{key}: expected a number from {least:g} on, got {repr(value)[:80]}")
    return found


def flag(args: Any, key: str, default: bool = False) -> bool:
    """Return whether a switch is on: YAML's true and false, or the same as text.

    Raises:
        ConfigError: if it has another value; names the key and the value.
    """
    value = getattr(args, key, None)
    if value is None:
        return default
    known = {"true": True, "1": True, "false": False, "0": False}
    found = known.get(str(value).lower())
    if found is None:
        raise ConfigError(f"{key}: expected true or false, got {repr(value)[:80]}")
    return found


def text(args: Any, key: str, default: str) -> str:
    """Return a key's value as text."""
    value = getattr(args, key, None)
    return default if value is None else str(value)
