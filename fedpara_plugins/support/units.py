"""Sizes, speeds and durations as text. kB = 10^3 bytes, KiB = 2^10 bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from fedpara_plugins.errors import ConfigError

__all__ = ["parse_rate", "parse_size", "readable_bytes", "readable_seconds"]

_RATES = {"bit": 1, "kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9}
_SIZES = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
_NUMBER = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*([A-Za-z]+)")


def parse_rate(text: str) -> float:
    """Return bits per second, from text such as ``1Mbit``, ``500 kbit`` or ``2.5Mbit/s``.

    Raises:
        ConfigError: the text is not a positive number with a unit; the message lists the units.
    """
    return _parse(text.removesuffix("/s"), _RATES, "1Mbit")


def parse_size(text: str) -> int:
    """Return bytes, rounded down, from text such as ``300kB``, ``1.5 MB`` or ``4MiB``.

    Raises:
        ConfigError: the text is not a positive number with a unit; the message lists the units.
    """
    return int(_parse(text, _SIZES, "300kB"))


def _parse(text: str, units: Mapping[str, int], example: str) -> float:
    # Units are case-sensitive: Mb and MB differ by a factor of 8, and a guess would hide that.
    match = _NUMBER.fullmatch(text.strip())
    value = float(match[1]) * units.get(match[2], 0) if match else 0.0
    if not 0 < value < math.inf:
        raise ConfigError(
            f"expected a positive number with one of {', '.join(units)}, such as {example}; "
            f"got {text!r}"
        )
    return value


def readable_bytes(size: float) -> str:
    """Return a size with three significant digits: ``61.0 MB``, ``1.28 MB``, ``420 B``."""
    for unit in ("GB", "MB", "kB"):
        if size >= _SIZES[unit]:
            return f"{_three_digits(size / _SIZES[unit])} {unit}"
    return f"{size:.0f} B"


def readable_seconds(seconds: float) -> str:
    """Return a duration with three significant digits: ``50.0 s``, ``8.13 min``, ``12 ms``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{_three_digits(seconds / length)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{digits}f}"
