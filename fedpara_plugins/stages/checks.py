"""Checks and small helpers that several stages share."""

from __future__ import annotations

import math
from collections.abc import Container

import torch

from fedpara_plugins.errors import PayloadError

__all__ = [
    "MAX_DIMENSIONS",
    "all_finite",
    "check_dimensions",
    "holds_infinity",
    "is_shape",
    "not_a_number",
    "unused_name",
]

MAX_DIMENSIONS = 64
"""Most dimensions of a tensor that torch computes with. It creates tensors with more, and then
arithmetic on them takes hours."""


def check_dimensions(name: str, count: int, most: int = MAX_DIMENSIONS) -> None:
    """Raise if a tensor has more than ``most`` dimensions.

    Raises:
        PayloadError: it has.
    """
    if count > most:
        raise PayloadError(f"tensor {name!r} has {count} dimensions, at most {most} are allowed")


def unused_name(name: str, used: Container[str]) -> str:
    """Return ``name``, with as many ``'`` appended as are needed to differ from all used names."""
    while name in used:
        name += "'"
    return name


def is_shape(shape: object) -> bool:
    """Return whether it is a list of at most `MAX_DIMENSIONS` integers, none of them negative."""
    # isinstance would accept True and False, which are no integers in JSON.
    return (
        isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(size) is int and size >= 0 for size in shape)
    )


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; makes no copy of the tensor."""
    # NaN and infinity both show in the minimum and the maximum.
    return not tensor.numel() or all(map(math.isfinite, torch.aminmax(tensor.detach())))


def holds_infinity(name: str, tensor: torch.Tensor, trouble: str) -> bool:
    """Return whether a tensor holds infinities, which a lossy stage sends as they are.

    They belong to a model: a mask of ``-inf``, say. Whether values *became* infinite is for the
    sender to know, who has what it started from.

    Args:
        name: the tensor's name.
        tensor: its values.
        trouble: see `not_a_number`.

    Raises:
        PayloadError: it holds NaN.
    """
    if not tensor.numel():
        return False
    low, high = map(float, torch.aminmax(tensor.detach()))
    if math.isnan(low) or math.isnan(high):
        raise not_a_number(name, tensor, trouble)
    return math.isinf(low) or math.isinf(high)


def not_a_number(name: str, tensor: torch.Tensor, trouble: str) -> PayloadError:
    """Return the error for a tensor that a lossy stage refuses because of NaN.

    Args:
        name: the tensor's name.
        tensor: its values; the message says how many of them are NaN.
        trouble: a relative clause about such values, such as ``which 'quantise' cannot carry``.
    """
    bad = int(torch.isnan(tensor).sum())
    return PayloadError(
        f"tensor {name!r}: {bad} of {tensor.numel()} values are NaN, {trouble}. "
        "Training has probably diverged: lower the learning rate or clip gradients; codec "
        "'lossless' sends such values as they are"
    )
