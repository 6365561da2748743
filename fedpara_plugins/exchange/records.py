"""Records of a message: named groups of tensors, of which the model is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedpara_plugins.models.spec import ModelSpec

__all__ = ["KindOf", "RecordKind", "State", "cast", "in_pieces", "plain_spec"]

State: TypeAlias = dict[str, Tensor]
"""Named tensors."""

RecordKind = Literal["model", "side", "update"]
"""The content of a record: ``model``, the state of a model or a part of it; ``side``, tensors that
go beside it, such as an optimizer's, none of them private; ``update``, side tensors that are a
difference already, such as the change of a variate."""

KindOf = Callable[[str], RecordKind]
"""The kind of a record, from its name."""


PIECE = 2**18
"""Values of a tensor that a check takes at a time."""


def plain_spec(names: Iterable[str]) -> ModelSpec:
    """Return the spec of tensors that belong to no converted model: nothing in it is private."""
    return ModelSpec(weights={}, keys=tuple(names), seed=0)


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another dtype, rounded if that is an integer type."""
    if value.dtype == dtype:
        return value
    if not dtype.is_floating_point and value.is_floating_point():
        value = value.round()
    return value.to(dtype)


def in_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors of one shape flat, some values at a time, so that a check makes no large copy.

    Args:
        tensors: of one shape, contiguous.
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for first in range(0, flat[0].numel(), PIECE):
        yield tuple(each[first : first + PIECE] for each in flat)
