"""References that both sides derive: version 0 for newcomers, zeros for self-contained messages.

The receiver derives either of them from the message's header alone. Every message therefore has the
same form: a codec, and a reference named by its hash. The header's ``extra`` names the state::

    {"base": {"kind": "seeded" | "zeros", "layout": TEXT}}

TEXT is base64 of a zlib stream of JSON, ``[[name, dtype, shape], ...]`` in the sender's order.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from fedpara_plugins.codecs.json_reader import json_cost, strict_json
from fedpara_plugins.codecs.reference import reference_hash
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.factors.initialise import seeded_shared
from fedpara_plugins.factors.seeded_gain import draw_bytes, draw_nanoseconds
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.spec_rows import plan_from_row
from fedpara_plugins.stages.handed_over import working_limit
from fedpara_plugins.stages.stage import (
    DTYPES,
    REAL_DTYPES,
    Tensors,
    byte_size,
    check_count,
    check_limit,
    dtype_name,
)

__all__ = [
    "SEEDED",
    "ZEROS",
    "CostlyDrawError",
    "DerivedKind",
    "DerivedReference",
    "derive_reference",
    "reference_from_header",
]

DerivedKind = Literal["seeded", "zeros"]
SEEDED: DerivedKind = "seeded"
ZEROS: DerivedKind = "zeros"

KEY = "base"
LONGEST_LAYOUT = 4 * 2**20
"""Largest size in bytes of the layout's JSON, unpacked; a payload's whole table has the same."""
ROW_ENTRIES = 2**18
"""Entries of a composed weight at one place of its second side that are allowed however small the
state is: they are computed at a time."""
DRAW_TIME, DRAW_TIME_PER_BYTE = 30e6, 35e6 / 2**20
"""Nanoseconds of one core that a draw may take, and those for each byte of the state: most of what
decoding may take in all."""

_Layout = Mapping[str, tuple[torch.dtype, list[int]]]
"""Dtype and shape by name."""


class CostlyDrawError(PayloadError):
    """A stranger's description of version 0 would take too long to draw.

    It is forged, or of an unusual model that this side has not built yet.
    """


@dataclass(frozen=True)
class DerivedReference:
    """A state that both sides derive.

    Attributes:
        tensors: the state.
        reference: its hash.
        extra: its description in the header.
    """

    tensors: Tensors
    reference: str
    extra: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the values in memory: zeros that nobody has written to take none."""
        kind = self.extra[KEY]["kind"]
        return 0 if kind == ZEROS else sum(value.nbytes for value in self.tensors.values())


def derive_reference(
    kind: DerivedKind, spec: ModelSpec, like: Mapping[str, Tensor]
) -> DerivedReference:
    """Derive a reference for states of these names, shapes and dtypes.

    Args:
        kind: ``seeded`` (version 0) has seeded normal values for the shared factors and zeros
            elsewhere; ``zeros`` has zeros only.
        spec: the model.
        like: any state of the model.
    """
    tensors = _derived(kind, spec, {n: (x.dtype, list(x.shape)) for n, x in like.items()})
    layout = [[name, dtype_name(value.dtype), list(value.shape)] for name, value in like.items()]
    packed = zlib.compress(json.dumps(layout, separators=(",", ":")).encode(), 9)
    text = base64.b64encode(packed).decode("ascii")
    extra = {KEY: {"kind": kind, "layout": text}}
    return DerivedReference(tensors, reference_hash(tensors), extra)


def reference_from_header(
    extra: Mapping[str, Any] | None,
    model: Mapping[str, Any] | None,
    *,
    limit: int,
    expect: ModelSpec | None = None,
    working: int | None = None,
) -> DerivedReference | None:
    """Derive the reference that a header describes; return None if it describes none.

    Args:
        extra: the header's field of that name.
        model: the header's field of that name.
        limit: largest size of the state in bytes.
        expect: this side's model, if it is known; the header's must be equal. It may take as long
            to draw as it does.
        working: bytes that all of this may take; three times the limit, and 16 MiB, if None.

    Raises:
        MismatchError: the header's model is not the one expected.
        CostlyDrawError: a model that is not known would take too long, or any too much memory.
        PayloadError: the description is malformed, or the state would exceed the limit.
    """
    if extra is None or KEY not in extra:
        return None
    try:
        kind, text = extra[KEY]["kind"], extra[KEY]["layout"]
        if kind not in (SEEDED, ZEROS):
            raise ValueError(f"unknown kind {str(kind)[:40]!r}")
        like = _layout(text, limit)
        if kind == SEEDED and expect is not None:
            expect.check_described(model or {}, here="this side", there="the payload's sender")
        spec = _spec(model or {}) if kind == SEEDED else None
    except PayloadError:
        raise
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        zlib.error,
        RecursionError,
    ) as error:
        raise PayloadError(f"the header's description of version 0 is malformed: {error}") from None
    if spec is not None:
        most = 3 * limit + 2**24 if working is None else working
        _check_spec(spec, like, known=expect is not None, working=most)
    tensors = _derived(kind, spec, like)
    return DerivedReference(tensors, reference_hash(tensors), {KEY: extra[KEY]})


def _spec(model: Mapping[str, Any]) -> ModelSpec:
    """Read weights and seed; the record may contain a part of the model, so no names are read."""
    rows, seed = model["weights"], model["seed"]
    weights = {str(row[0]): plan_from_row(row) for row in rows}
    if type(seed) is not int or len(weights) != len(rows):
        raise ValueError("the seed is not an integer, or a weight is listed twice")
    return ModelSpec(weights=weights, keys=(), seed=seed)


def _layout(text: str, limit: int) -> _Layout:
    unpacker = zlib.decompressobj()
    plain = unpacker.decompress(base64.b64decode(text, validate=True), LONGEST_LAYOUT + 1)
    if len(plain) > LONGEST_LAYOUT:
        raise ValueError("the layout is too long")
    layout = plain.decode("utf-8")
    check_limit(json_cost(layout), working_limit(limit), "the layout of version 0")
    rows = strict_json(layout)
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError("the layout is not a list of tensors")
    check_count(len(rows), "the layout of version 0")
    like = {name: (DTYPES[dtype], _checked_shape(shape)) for name, dtype, shape in rows}
    if len(like) != len(rows) or not all(isinstance(name, str) for name in like):
        raise ValueError("a name is not text, or is listed twice")
    check_limit(_size(like), limit, "version 0")
    return like


def _checked_shape(shape: object) -> list[int]:
    if not isinstance(shape, list) or len(shape) > 32:
        raise ValueError("a shape is not a list of sizes")
    if not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise ValueError("a shape is not a list of sizes")
    return shape


def _size(like: _Layout) -> int:
    return sum(byte_size(dtype, shape) for dtype, shape in like.values())


def _drawn(spec: ModelSpec, like: _Layout) -> dict[str, dict[str, str]]:
    """Return the weights to draw: those whose shared factors are all in the layout.

    Other weights of the description are never drawn, so they cost nothing.

    Returns:
        By weight, the full name of each shared factor by its short name.
    """
    found = {}
    for weight, plan in spec.weights.items():
        keys = spec.factor_keys(weight)
        # Fixed factors need not travel: both sides have them.
        passed = {*plan.private_names, *(n for n in plan.fixed_names if keys[n] not in like)}
        shared = {name: key for name, key in keys.items() if name not in passed}
        if all(_fits(like.get(key), plan.factor_shape(name)) for name, key in shared.items()):
            found[weight] = shared
    return found


def _fits(entry: tuple[torch.dtype, list[int]] | None, shape: tuple[int, ...]) -> bool:
    return entry is not None and entry[0] in REAL_DTYPES and tuple(entry[1]) == shape


def _check_spec(spec: ModelSpec, like: _Layout, *, known: bool, working: int) -> None:
    """Raise unless sizes and deviations, which come from a stranger, are sound enough to draw.

    Raises:
        CostlyDrawError: drawing would take too long, and the model is not known; or too much
            memory.
        PayloadError: a number is out of range, or composed weights would be too large.
    """
    plans = {weight: spec.weights[weight] for weight in _drawn(spec, like)}
    size = _size(like)
    for weight, plan in plans.items():
        numbers = [plan.scale, plan.factor_std, plan.variance]
        if plan.method.private:
            numbers.append(plan.private_std)
        if not all(1e-30 < number < 1e30 for number in numbers):
            raise PayloadError(
                f"{weight[:200]!r}: no factors can have shape {plan.shape}, rank {plan.rank} and "
                f"the numbers {numbers}"
            )
        row, most = prod(plan.shape[2:]), max(ROW_ENTRIES, size // 8)
        if row > most:
            raise PayloadError(
                f"{weight[:200]!r}: a place of the composed weight has {row} entries; at most "
                f"{most} are computed"
            )
    needed = size + max(map(draw_bytes, plans.values()), default=0)
    if needed > working:
        raise CostlyDrawError(
            f"version 0: drawing a state of {size} bytes would take {needed}, and {working} are "
            f"allowed: the message is forged, or of a model that cannot start so"
        )
    cost = sum(map(draw_nanoseconds, plans.values()))
    allowed = DRAW_TIME + DRAW_TIME_PER_BYTE * size
    if cost > allowed and not known:
        raise CostlyDrawError(
            f"version 0: its {len(plans)} weights would take some {cost / 1e6:.3g} ms to draw, and "
            f"{allowed / 1e6:.3g} ms are allowed for a state of {size} bytes: the message "
            f"is forged, or its ranks are far too small to be useful"
        )


def _derived(kind: DerivedKind, spec: ModelSpec | None, like: _Layout) -> Tensors:
    seeded: Tensors = {}
    if kind == SEEDED and spec is not None:
        for weight, keys in _drawn(spec, like).items():
            values = seeded_shared(spec.weights[weight], seed=spec.seed, key=weight)
            for name, key in keys.items():
                seeded[key] = values[name].to(like[key][0])
    return {
        name: seeded[name] if name in seeded else torch.zeros(shape, dtype=dtype)
        for name, (dtype, shape) in like.items()
    }
