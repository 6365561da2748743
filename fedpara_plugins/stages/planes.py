"""Stage ``planes``: the bytes of each tensor sorted by their weight, for the coder that follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.stage import (
    Notes,
    Stage,
    Tensors,
    byte_size,
    check_limit,
    check_notes,
    dtype_name,
    pack_dtypes,
    tensor_bytes,
    unpack_dtypes,
)

__all__ = ["PlanesStage"]

_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_SIGNED = frozenset({torch.int64, torch.int32, torch.int16})
_WORDS: Mapping[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (2, 4, 8)}


class PlanesStage(Stage):
    """All lowest bytes of a tensor, then all second bytes, and so on, as one tensor of uint8.

    Neighbouring values share their high bytes, and an entropy coder sees that only where those
    stand together. The sign is moved to the lowest bit first: of floats by rotating the word left
    by one, which leaves the exponent whole in the highest byte (bfloat16, float32); of integers by
    counting 0, -1, 1, -2, ..., which leaves zeros there. Acts on floating and signed tensors of
    2, 4 or 8 bytes a value and at least one dimension. A tensor of shape (a, b) becomes one of
    shape (bytes, a, b).

    Notes: ``dtypes`` and ``each`` (see `pack_dtypes`; ``-`` for a tensor passed unchanged).
    """

    name = "planes"
    lossless = True
    sorts = True

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Sort."""
        acted = {n: t for n, t in tensors.items() if t.dtype in _FLOATS | _SIGNED and t.ndim}
        coded = {n: _sorted(t) if n in acted else t for n, t in tensors.items()}
        return coded, pack_dtypes([t.dtype if n in acted else None for n, t in tensors.items()])

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Undo it.

        Raises:
            PayloadError: the notes do not fit the tensors, or the tensors exceed the limit.
        """
        check_notes(self.name, notes, {"dtypes": list, "each": str})
        dtypes = unpack_dtypes(notes, len(tensors))
        size = sum(byte_size(tensor.dtype, tensor.shape) for tensor in tensors.values())
        check_limit(size, limit, "the tensors behind their planes")
        return {
            name: tensor if dtype is None else _restored(name, tensor, dtype)
            for (name, tensor), dtype in zip(tensors.items(), dtypes, strict=True)
        }


def _sorted(tensor: torch.Tensor) -> torch.Tensor:
    width = tensor.dtype.itemsize
    words = np.asarray(tensor_bytes(tensor)).view(_WORDS[width])
    if tensor.dtype in _FLOATS:
        turned = (words << 1) | (words >> (8 * width - 1))
    else:
        turned = (words << 1) ^ np.negative(words >> (8 * width - 1))
    planes = np.empty((width, len(words)), dtype=np.uint8)
    for place in range(width):
        planes[place] = turned >> (8 * place) if place else turned
    return torch.from_numpy(planes).reshape(width, *tensor.shape)


def _restored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    width = dtype.itemsize
    fits = tensor.dtype == torch.uint8 and tensor.ndim > 1 and tensor.shape[0] == width
    if not fits or dtype not in _FLOATS | _SIGNED:
        raise PayloadError(
            f"tensor {name!r}: expected {width} planes of uint8 for {dtype_name(dtype)}, got "
            f"{tuple(tensor.shape)} {tensor.dtype}"
        )
    planes = np.asarray(tensor_bytes(tensor)).reshape(width, tensor[0].numel())
    turned = planes[0].astype(_WORDS[width])
    for place in range(1, width):
        turned |= planes[place].astype(_WORDS[width]) << (8 * place)
    if dtype in _FLOATS:
        words = (turned >> 1) | (turned << (8 * width - 1))
    else:
        words = (turned >> 1) ^ np.negative(turned & 1)
    return torch.from_numpy(words.view(np.uint8)).view(dtype).reshape(tensor.shape[1:])
