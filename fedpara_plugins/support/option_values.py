"""Values of options, converted to their declared types from these types or from text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from fedpara_plugins.errors import ConfigError

__all__ = ["RELATIVE", "Overrides", "convert_value", "parse_clip", "parse_overrides", "to_float"]

Overrides = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
"""Pairs of a pattern and of options with their values; hashable."""

RELATIVE = "relative"
"""The value of the option ``clip`` that bounds steps relative to factors; a share may follow."""

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def convert_value(option: str, kind: str, value: Any) -> Any:
    """Return an option's value in its declared type.

    Args:
        option: name of the option, for the error.
        kind: name of the type: ``bool``, ``float``, ``int``, ``str``, or ``tuple`` for patterns.
        value: of that type, or text; patterns may be one text with commas.

    Raises:
        ConfigError: the value cannot be converted.
    """
    expected, convert = _KINDS[kind]
    try:
        return convert(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        shown = repr(value)[:80]
        raise ConfigError(f"option {option!r}: expected {expected}, got {shown}") from None


def parse_overrides(overrides: Any) -> Overrides:
    """Return overrides as nested tuples, from a mapping, pairs, or text.

    Raises:
        ConfigError: they have none of these forms.
    """
    items = overrides.items() if isinstance(overrides, Mapping) else overrides
    if isinstance(overrides, str):
        items = [_split_override(part) for part in overrides.split(";") if part.strip()]
    try:
        return tuple(
            (str(pattern), tuple(sorted(dict(options).items()))) for pattern, options in items
        )
    except (TypeError, ValueError):
        raise ConfigError(
            f"option 'overrides': expected a mapping of patterns to options or text such as "
            f"'body.*: gamma=0.5; head: method=none', got {overrides!r}"
        ) from None


def parse_clip(value: Any) -> float | str | None:
    """Return a value of the option ``clip``: a bound, ``relative``, ``relative:SHARE``, or None.

    Raises:
        ConfigError: it is none of these.
    """
    text = value.strip().lower() if isinstance(value, str) else value
    if text == "none":
        return None
    kind, colon, share = text.partition(":") if isinstance(text, str) else ("", "", "")
    try:
        if kind.strip() != RELATIVE:
            return _above_zero(text)
        return f"{RELATIVE}:{_above_zero(share):.9g}" if colon else RELATIVE
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"option 'clip': expected 'relative', 'relative:SHARE' with a share above 0 such as "
            f"'relative:0.03', a number above 0, or 'none', got {repr(value)[:80]}"
        ) from None


def _above_zero(value: Any) -> float:
    number = to_float(value)
    if not 0 < number < inf:
        raise ValueError
    return number


def to_float(value: Any) -> float:
    """Return a number.

    Raises:
        TypeError, ValueError: the value is no number; a bool is none.
    """
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _split_override(text: str) -> tuple[str, list[list[str]]]:
    pattern, _, options = text.partition(":")
    pairs = [part.replace("-", "_").split("=") for part in options.split(",")]
    return pattern.strip(), [[word.strip() for word in pair] for pair in pairs]


def _to_patterns(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else list(value)
    if not all(isinstance(part, str) for part in parts):
        raise TypeError
    return tuple(part.strip() for part in parts if part.strip())


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or (not isinstance(value, (int, str)) and value != int(value)):
        raise TypeError
    return int(value)


def _to_text(value: Any) -> str:
    if value is None:
        raise TypeError
    return str(value)


_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "tuple": ("patterns, as a list of text or as text with commas", _to_patterns),
    "bool": ("true or false (a bool)", lambda value: _BOOLEANS[str(value).lower()]),
    "float": ("a number (a float)", to_float),
    "int": ("an integer (an int)", _to_int),
    "str": ("text (a str)", _to_text),
}
"""For each type what an error expects, and the conversion."""
