"""Many small tensors at a time: a call of torch for each costs more than their arithmetic."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedpara_plugins.stages.stage import Tensors

__all__ = ["SMALL", "Counts", "batches", "joined", "parts_of"]

SMALL = 2**12
"""Bytes up to which a tensor is worth joining with others."""
_BATCH = 2**16
"""Bytes from which on a batch is full, so that it takes little memory."""

Counts = NDArray[np.int64]
K = TypeVar("K", bound=Hashable)


def batches(tensors: Tensors, kinds: Mapping[str, K]) -> Iterator[tuple[K, list[str]]]:
    """Yield names of small tensors of one kind, as many as are worked on together.

    Args:
        tensors: by name.
        kinds: of the tensors that are meant, by name.
    """
    names: dict[K, list[str]] = {}
    sizes: dict[K, int] = {}
    for name, kind in kinds.items():
        names.setdefault(kind, []).append(name)
        sizes[kind] = sizes.get(kind, 0) + tensors[name].nbytes
        if sizes[kind] >= _BATCH:
            yield kind, names.pop(kind)
            del sizes[kind]
    yield from names.items()


def joined(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Counts]:
    """Return the values of tensors of one dtype, end to end, and how many each has."""
    flat = [tensor if tensor.ndim == 1 else tensor.reshape(-1) for tensor in tensors]
    return torch.cat(flat), np.array([each.numel() for each in flat], dtype=np.int64)


def parts_of(values: torch.Tensor, counts: Counts, shapes: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Yield successive tensors of these shapes, each with memory of its own.

    Args:
        values: of all of them, end to end.
        counts: how many values each has.
        shapes: one for each.
    """
    for part, shape in zip(torch.split(values, counts.tolist()), shapes, strict=True):
        yield part.clone() if len(shape) == 1 else part.clone().reshape(shape)
