"""Version 0: what a newcomer holds at no cost, and what a self-contained message is coded against.

Both are states that the receiver derives from the message's header alone, so every message has one
form: a codec, and a reference named by its hash. The header's ``extra`` says which state is meant::

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

from fedpara_plugins.codecs.reference import reference_hash
from fedpara_plugins.codecs.stage import (
    DTYPES,
    REAL_DTYPES,
    Tensors,
    byte_size,
    check_limit,
    dtype_name,
)
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.initialise import seeded_shared
from fedpara_plugins.spec import ModelSpec, plan_from_row

__all__ = ["SEEDED", "ZEROS", "Base", "BaseKind", "base_from_header", "base_of"]

BaseKind = Literal["seeded", "zeros"]
SEEDED: BaseKind = "seeded"
ZEROS: BaseKind = "zeros"

KEY = "base"
LONGEST_LAYOUT = 16 * 2**20
"""Bytes of the layout's JSON, unpacked."""
DENSE_FACTOR = 200
"""Deriving factors composes their weights once: dense bytes (float64) allowed a byte of limit."""


@dataclass(frozen=True)
class Base:
    """A state that both sides derive.

    Attributes:
        tensors: the state.
        reference: its hash.
        extra: what the header says of it.
    """

    tensors: Tensors
    reference: str
    extra: Mapping[str, Any]


def base_of(kind: BaseKind, spec: ModelSpec, like: Mapping[str, Tensor]) -> Base:
    """The base for a state of these names, shapes and dtypes.

    Args:
        kind: ``seeded`` has seeded normal values for the shared factors and zeros elsewhere;
            ``zeros`` has nothing but zeros.
        spec: the model.
        like: any state of it.
    """
    tensors = _derived(kind, spec, like)
    layout = [[name, dtype_name(value.dtype), list(value.shape)] for name, value in like.items()]
    packed = zlib.compress(json.dumps(layout, separators=(",", ":")).encode(), 9)
    text = base64.b64encode(packed).decode("ascii")
    return Base(tensors, reference_hash(tensors), {KEY: {"kind": kind, "layout": text}})


def base_from_header(
    extra: Mapping[str, Any] | None, model: Mapping[str, Any] | None, *, limit: int
) -> Base | None:
    """The base that a header means; None if it means none.

    Args:
        extra: the header's field of that name.
        model: the header's field of that name.
        limit: bytes that the state may have.

    Raises:
        PayloadError: the description is malformed, or the state would exceed the limit.
    """
    if extra is None or KEY not in extra:
        return None
    try:
        kind, text = extra[KEY]["kind"], extra[KEY]["layout"]
        if kind not in (SEEDED, ZEROS):
            raise ValueError(f"unknown kind {str(kind)[:40]!r}")
        like = _layout(text, limit)
        spec = _spec(model or {}) if kind == SEEDED else None
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
        _check_spec(spec, limit)
    tensors = _derived(kind, spec, like)
    return Base(tensors, reference_hash(tensors), {KEY: extra[KEY]})


def _spec(model: Mapping[str, Any]) -> ModelSpec:
    """Weights and seed; a record may hold a part of the model, so its names do not matter."""
    weights = {str(row[0]): plan_from_row(row) for row in model["weights"]}
    return ModelSpec(weights=weights, keys=(), seed=int(model["seed"]))


def _layout(text: str, limit: int) -> Tensors:
    unpacker = zlib.decompressobj()
    plain = unpacker.decompress(base64.b64decode(text, validate=True), LONGEST_LAYOUT + 1)
    if len(plain) > LONGEST_LAYOUT:
        raise ValueError("the layout is too long")
    rows = json.loads(plain)
    sizes = [byte_size(DTYPES[dtype], _checked_shape(shape)) for _, dtype, shape in rows]
    check_limit(sum(sizes), limit, "version 0")
    like = {
        str(name): torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        for name, dtype, shape in rows
    }
    if len(like) != len(rows):
        raise ValueError("a name stands there twice")
    return like


def _checked_shape(shape: object) -> list[int]:
    if not isinstance(shape, list) or len(shape) > 32:
        raise ValueError("a shape is no list of sizes")
    if not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise ValueError("a shape is no list of sizes")
    return shape


def _check_spec(spec: ModelSpec, limit: int) -> None:
    """Sizes and deviations come from a stranger: nothing is drawn before they are sound."""
    for weight, plan in spec.weights.items():
        sizes = [*plan.shape, plan.rank]
        numbers = [plan.scale, plan.factor_std, plan.variance]
        if plan.method.private:
            numbers.append(plan.private_std)
        sound = all(1e-30 < number < 1e30 for number in numbers)
        if len(plan.shape) < 2 or min(sizes) < 1 or not sound:
            raise PayloadError(
                f"{weight[:200]}: no factors can have shape {plan.shape}, rank {plan.rank} and the "
                f"numbers {numbers}"
            )
        check_limit(8 * prod(plan.shape), DENSE_FACTOR * limit, f"the composed {weight}")
        entries = sum(prod(plan.factor_shape(name)) for name in plan.factor_names)
        check_limit(4 * entries, DENSE_FACTOR * limit, f"the factors of {weight}")


def _derived(kind: BaseKind, spec: ModelSpec | None, like: Mapping[str, Tensor]) -> Tensors:
    seeded: Tensors = {}
    if kind == SEEDED and spec is not None:
        for weight, plan in spec.weights.items():
            keys = spec.factor_keys(weight)
            values = seeded_shared(plan, seed=spec.seed, key=weight)
            seeded.update({keys[name]: value for name, value in values.items()})
    state: Tensors = {}
    for name, tensor in like.items():
        value = seeded.get(name)
        usable = value is not None and value.shape == tensor.shape and tensor.dtype in REAL_DTYPES
        if usable and value is not None:
            state[name] = value.to(tensor.dtype)
        else:
            state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return state
