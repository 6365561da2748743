"""Reading the options of a stage from text, with errors that say what is known and expected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from fedpara_plugins.errors import ConfigError

__all__ = ["choice", "known_options", "number_text", "real", "whole"]


def known_options(stage: str, options: Mapping[str, str], known: Sequence[str]) -> None:
    """Refuse options that are not among the known ones.

    Raises:
        ConfigError: names the nearest and all known options.
    """
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ConfigError(f"{stage!r} has no option {name!r}{hint} known: {', '.join(known)}")


def choice(stage: str, key: str, value: str, allowed: Sequence[str]) -> str:
    """One of the allowed words.

    Raises:
        ConfigError: another word.
    """
    if value not in allowed:
        near = get_close_matches(value, allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"option {key!r} of {stage!r}: expected {' or '.join(allowed)}, got {value!r}{hint}"
        )
    return value


def whole(stage: str, key: str, value: str, low: int, high: int) -> int:
    """An integer from ``low`` to ``high``.

    Raises:
        ConfigError: no integer, or one out of range.
    """
    # int() would also read "1_0" and digits of other scripts.
    digits = value.isascii() and value.isdecimal() and len(value) <= len(str(high))
    if not digits or not low <= int(value) <= high:
        raise ConfigError(
            f"option {key!r} of {stage!r}: expected an integer from {low} to {high}, got {value!r}"
        )
    return int(value)


def real(stage: str, key: str, value: str, low: float, high: float) -> float:
    """A number from ``low`` to ``high``.

    Raises:
        ConfigError: no number, or one out of range.
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
    """The shortest text that reads back to this number, without a trailing ``.0``."""
    return repr(float(number)).removesuffix(".0")
