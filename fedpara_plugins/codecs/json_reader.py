"""A strict reader of untrusted JSON: bounded nesting and numbers, no repeated keys, no NaN."""

from __future__ import annotations

import gc
import json
import math
from typing import Any

import numpy as np

from fedpara_plugins.errors import PayloadError

__all__ = ["MAX_DEPTH", "json_cost", "strict_json"]

MAX_DEPTH = 32
"""Deepest nesting of JSON, in the payload's header and in safetensors'."""
MAX_DIGITS = 100
"""Most digits of an integer in JSON; converting a huge one takes quadratic time."""

_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_CHUNK = 2**16


def json_cost(text: str) -> int:
    """Return a bound of the memory in bytes that `strict_json` takes, its result included."""
    width = 1 if text.isascii() else 4
    containers = text.count("[") + text.count("{")
    return 3 * width * len(text) + 96 * containers + 30 * text.count('"') + 32 * text.count(",")


def strict_json(text: str) -> Any:
    """Parse JSON of bounded nesting, without repeated keys, NaN, infinity or giant numbers.

    Raises:
        PayloadError: the text is malformed or has any of these.
    """
    _check_depth(text)
    # A text of many lists makes the garbage collector look through everything again and again,
    # for nothing: it takes ten times as long as the parser.
    collects = gc.isenabled()
    gc.disable()
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_bounded_int,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except PayloadError:
        raise
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"malformed JSON: {error}") from error
    finally:
        if collects:
            gc.enable()


def _check_depth(text: str) -> None:
    """Raise if brackets outside of strings are nested too deep."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    plain = text.replace("\\\\", "").replace('\\"', "").encode("utf-8", "surrogatepass")
    quotes = depth = 0
    for start in range(0, len(plain), _CHUNK):
        octets = np.frombuffer(plain, np.uint8, min(_CHUNK, len(plain) - start), start)
        seen = np.cumsum(octets == ord('"'), dtype=np.int32) + quotes
        steps = _STEPS[octets]
        steps[seen % 2 == 1] = 0  # brackets inside strings do not count
        levels = np.cumsum(steps, dtype=np.int32) + depth
        if int(levels.max()) > MAX_DEPTH:
            raise PayloadError(f"JSON nested deeper than {MAX_DEPTH} levels")
        quotes, depth = int(seen[-1]), int(levels[-1])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise PayloadError("a JSON object has the same key twice")
    return found


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise PayloadError(f"JSON integer of {len(digits)} digits, at most {MAX_DIGITS} are read")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise PayloadError(f"JSON number {number[:20]} is not finite")
    return value
