"""Readers of a stage's options, whose errors list what is known and expected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from fedpara_plugins.errors import ConfigError

__all__ = ["check_option_names", "number_text", "read_choice", "read_integer", "read_number"]


def check_option_names(stage: str, options: Mapping[str, str], known: Sequence[str]) -> None:
    """Raise if an option is not among the known ones.

    Raises:
        ConfigError: an option is unknown; the message names the nearest and all known options.
    """
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ConfigError(f"{stage!r} has no option {name!r}{hint} known: {', '.join(known)}")


def read_choice(stage: str, key: str, value: str, allowed: Sequence[str]) -> str:
    """Return the value of an option that takes one of a few words.

    Raises:
        ConfigError: the value is another word.
    """
    if value not in allowed:
        near = get_close_matches(value, allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"option {key!r} of {stage!r}: expected {' or '.join(allowed)}, got {value!r}{hint}"
        )
    return value


def read_integer(stage: str, key: str, value: str, low: int, high: int) -> int:
    """Return the value of an option that takes an integer from ``low`` to ``high``.

    Raises:
        ConfigError: the value is no integer, or out of range.
    """
    # int() would also read "1_0" and digits of other scripts.
    digits = value.isascii() and value.isdecimal() and len(value) <= len(str(high))
    if not digits or not low <= int(value) <= high:
        raise ConfigError(
            f"option {key!r} of {stage!r}: expected an integer from {low} to {high}, got {value!r}"
        )
    return int(value)


def read_number(stage: str, key: str, value: str, low: float, high: float) -> float:
    """Return the value of an option that takes a number from ``low`` to ``high``.

    Raises:
        ConfigError: the value is no number, or out of range.
    """
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise ConfigError(
            f"option {key!r} of {stage!r}: expected a number from {number_text(low)} to "
            f"{number_text(high)}, got {value!r}"
        )
    return number


def number_text(number: float) -> str:
    """Return the shortest text that reads back to this number, without a trailing ``.0``."""
    return repr(float(number)).removesuffix(".0")
