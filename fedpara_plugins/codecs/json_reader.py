"""A strict reader of untrusted JSON: bounded nesting and numbers, no repeated keys, no NaN."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from fedpara_plugins.errors import PayloadError

__all__ = ["MAX_DEPTH", "strict_json"]

MAX_DEPTH = 32
"""Deepest nesting of JSON, in the payload's header and in safetensors'."""
MAX_DIGITS = 100
"""Most digits of an integer in JSON; converting a huge one takes quadratic time."""

# Whole strings are tokens, so that brackets inside them do not count. Escapes are removed first: a
# pattern with escapes would make the engine keep some 100 bytes for each character of a string.
_TOKENS = re.compile(r'"[^"]*"?|[\[\]{}]')
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}


def strict_json(text: str) -> Any:
    """Parse JSON of bounded nesting, without repeated keys, NaN, infinity or giant numbers.

    Raises:
        PayloadError: the text is malformed or has any of these.
    """
    unescaped = text.replace("\\\\", "").replace('\\"', "")
    depth = 0
    for token in _TOKENS.finditer(unescaped):
        depth += _STEPS.get(unescaped[token.start()], 0)
        if depth > MAX_DEPTH:
            raise PayloadError(f"JSON nested deeper than {MAX_DEPTH} levels")
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
