"""The values of a reply besides its tensors: examples, metrics, and what a client holds by hash."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

from fedpara_plugins.errors import PayloadError

__all__ = ["MOST_EXAMPLES", "check_figures", "check_hashes", "examples_of"]

MOST_EXAMPLES = 2**53
"""Largest number of examples that a reply may state; floats count exactly up to it."""

HASH = re.compile("[0-9a-f]{64}")
MOST_HASHES = 64
"""Hashes that a client may name of one record; it keeps two."""
MOST_DECODERS = 64
LONGEST_NAME = 64


def check_hashes(
    holds: Mapping[str, str],
    has: Mapping[str, Sequence[str]],
    decoders: Collection[str],
    *,
    records: int,
) -> None:
    """Raise unless what a client states about itself is bounded, and its hashes are hashes.

    Args:
        holds: by record, the hash of what it has received and kept.
        has: by record, the hashes of what it holds, if it has lost what it needed.
        decoders: names of the entropy stages that it can decode.
        records: number of records that the server sends.

    Raises:
        PayloadError: too many, too long, or no hash.
    """
    for what in (holds, has):
        if len(what) > 2 * records + 4:
            raise PayloadError(
                f"the reply names what the client holds of {len(what)} records, this server sends "
                f"{records}"
            )
    named = [*holds.values(), *(value for values in has.values() for value in values[:MOST_HASHES])]
    if any(len(values) > MOST_HASHES for values in has.values()):
        raise PayloadError(f"the reply names more than {MOST_HASHES} hashes of one record")
    if wrong := [value for value in named if not HASH.fullmatch(value)]:
        raise PayloadError(f"the reply names {wrong[0][:80]!r} as a hash")
    if len(decoders) > MOST_DECODERS or any(len(name) > LONGEST_NAME for name in decoders):
        raise PayloadError(f"the reply names {len(decoders)} decoders, or a very long one")


def examples_of(value: object, *, name: str = "examples", weighs: bool = True) -> float:
    """Return a number of examples that a reply states.

    Args:
        value: as it came.
        name: under which it came.
        weighs: whether the reply counts by it, so that it must be above 0.

    Raises:
        PayloadError: it is no number, not finite, negative, or larger than `MOST_EXAMPLES`; or 0
            where it weighs.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    low = "above 0" if weighs else "0 or more"
    if not number or not (0 <= value <= MOST_EXAMPLES) or (weighs and value == 0):  # type: ignore[operator]
        raise PayloadError(
            f"the reply states {repr(value)[:80]} as {name!r}, expected a number {low}, at most "
            f"2^53"
        )
    return float(value)  # type: ignore[arg-type]


def check_figures(record: str, values: Mapping[str, object]) -> None:
    """Raise for a float that is NaN or infinite; values of other types pass.

    Args:
        record: its name.
        values: single values and lists by name.

    Raises:
        PayloadError: names record and value.
    """
    for name, value in values.items():
        for each in value if isinstance(value, list) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise PayloadError(
                    f"record {record[:80]!r} of the reply holds {each} as {name[:80]!r}, expected "
                    f"finite numbers"
                )
