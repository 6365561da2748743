"""Stage ``planes``: the bytes of each tensor sorted by significance, for the coder that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.dtypes import (
    REAL_DTYPES,
    dtype_name,
    pack_dtypes,
    tensor_bytes,
    unpack_dtypes,
)
from fedpara_plugins.stages.handed_over import HandedOver, decode_each, may_overwrite
from fedpara_plugins.stages.small_tensors import SMALL, batches, joined, parts_of
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_limit, check_notes

__all__ = ["PlanesStage"]

_SIGNED = frozenset({torch.int64, torch.int32, torch.int16})
_SORTED = REAL_DTYPES | _SIGNED
_LARGE = 2**20
"""Bytes from which on planes are joined in their own memory, which takes longer."""
_CHUNK = 2**15
"""Words that are joined at a time."""
_Bytes = NDArray[np.uint8]
_WORDS: Mapping[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (2, 4, 8)}


class PlanesStage(Stage):
    """All lowest bytes of a tensor, then all second bytes, and so on, as one uint8 tensor.

    Neighbouring values share their high bytes; an entropy coder profits only if those are adjacent.
    The sign moves to the lowest bit first. Words of floats are rotated left by one bit, which
    leaves the exponent whole in the highest byte (bfloat16, float32). Integers are zigzag-coded
    (0, -1, 1, -2, ... become 0, 1, 2, 3, ...), which leaves zeros in the high bytes. Acts on
    floating-point and signed tensors of 2, 4 or 8 bytes a value and at least one dimension. A
    tensor of shape (a, b) becomes one of shape (bytes, a, b).

    Notes: ``dtypes`` and ``each`` (see `pack_dtypes`; ``-`` for a tensor passed unchanged).
    """

    name = "planes"
    lossless = True
    sorts = True
    owns_output = True

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Split tensors into byte planes."""
        acts = {n: t.dtype in _SORTED and t.ndim > 0 for n, t in tensors.items()}
        coded = {n: _to_planes(t) if acts[n] else t for n, t in tensors.items()}
        return coded, pack_dtypes([t.dtype if acts[n] else None for n, t in tensors.items()])

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Join the byte planes.

        Raises:
            PayloadError: the notes do not fit the tensors, or the tensors exceed the limit.
        """
        check_notes(self.name, notes, {"dtypes": list, "each": str})
        dtypes = unpack_dtypes(notes, len(tensors))
        size = sum(tensor.nbytes for tensor in tensors.values())
        what = "the tensors behind their planes"
        check_limit(size, limit, what)

        def in_place(tensor: torch.Tensor) -> bool:
            return tensor.nbytes >= _LARGE and may_overwrite(tensors, tensor)

        done: Tensors = {}
        if not isinstance(tensors, HandedOver) or tensors.fits(size):
            done = _small_tensors(tensors, dtypes)
        else:
            # No list of tensors here: it would keep alive what is used up.
            kinds = [(x.nbytes, in_place(x)) for x in tensors.values()]
            halves = [
                size // 2 for (size, own), dtype in zip(kinds, dtypes, strict=True) if own and dtype
            ]
            sizes = [
                0 if own or dtype is None else size
                for (size, own), dtype in zip(kinds, dtypes, strict=True)
            ]
            tensors.check_peak(sizes, what, held=max(halves, default=0))

        def decode(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            if name in done:
                return done.pop(name)
            _check_planes(name, tensor, dtype)
            if in_place(tensor):
                return _from_planes_in_place(tensor, dtype)
            return _from_planes(tensor, dtype)

        return decode_each(tensors, dtypes, decode)


def _to_planes(tensor: torch.Tensor) -> torch.Tensor:
    width = tensor.dtype.itemsize
    words = np.asarray(tensor_bytes(tensor)).view(_WORDS[width])
    if tensor.dtype in REAL_DTYPES:
        moved = (words << 1) | (words >> (8 * width - 1))
    else:
        moved = (words << 1) ^ np.negative(words >> (8 * width - 1))
    planes = np.empty((width, len(words)), dtype=np.uint8)
    for place in range(width):
        planes[place] = moved >> (8 * place) if place else moved
    return torch.from_numpy(planes).reshape(width, *tensor.shape)


def _check_planes(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    width = dtype.itemsize
    fits = tensor.dtype == torch.uint8 and tensor.ndim > 1 and tensor.shape[0] == width
    if not fits or dtype not in _SORTED:
        raise PayloadError(
            f"tensor {name!r}: expected {width} planes of uint8 for {dtype_name(dtype)}, got "
            f"{tuple(tensor.shape)} {tensor.dtype}"
        )


def _small_tensors(tensors: Tensors, dtypes: Sequence[torch.dtype | None]) -> Tensors:
    """Return the small tensors behind their planes, many at a time.

    Raises:
        PayloadError: see `_check_planes`.
    """
    kinds: dict[str, torch.dtype] = {}
    for (name, tensor), dtype in zip(tensors.items(), dtypes, strict=True):
        if dtype is not None and 0 < tensor.nbytes <= SMALL:
            _check_planes(name, tensor, dtype)
            kinds[name] = dtype
    found: Tensors = {}
    for dtype, names in batches(tensors, kinds):
        data, sizes = joined([tensors[name] for name in names])
        octets = data.numpy()
        counts = sizes // dtype.itemsize
        # The first byte of each word, and the distance to its next one.
        before = np.cumsum(sizes) - sizes - (np.cumsum(counts) - counts)
        lowest = np.arange(counts.sum()) + np.repeat(before, counts)
        between = np.repeat(counts, counts)
        words = _words([octets[lowest + k * between] for k in range(dtype.itemsize)], dtype)
        values = torch.from_numpy(words.view(np.uint8)).view(dtype)
        shapes = [tensors[name].shape[1:] for name in names]
        found.update(zip(names, parts_of(values, counts, shapes), strict=True))
    return found


def _from_planes(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    count = tensor[0].numel()
    planes = np.asarray(tensor_bytes(tensor)).reshape(dtype.itemsize, count)
    if count <= _CHUNK:
        octets = torch.from_numpy(_words(planes, dtype).view(np.uint8))
        return octets.view(dtype).reshape(tensor.shape[1:])
    values = torch.empty(tensor.shape[1:], dtype=dtype, device="cpu")
    _join(list(planes), dtype, out=np.asarray(tensor_bytes(values)))
    return values


def _from_planes_in_place(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Join planes in their own memory and half as much again."""
    width, count = dtype.itemsize, tensor[0].numel()
    both = np.asarray(tensor_bytes(tensor))
    low, high = both.reshape(width, count)[: width // 2], both.reshape(width, count)[width // 2 :]
    spare = low.copy()
    half = (count + 1) // 2
    # The words of the first half fill the memory of the low planes, which `spare` still holds.
    _join([*spare[:, :half], *high[:, :half]], dtype, out=both[: width * half])
    # Those of the other half take that of the high planes, which move to what `spare` has done.
    spare[:, : count - half] = high[:, half:]
    rest = [*spare[:, half:], *spare[:, : count - half]]
    _join(rest, dtype, out=both[width * half :])
    return tensor.reshape(-1).view(dtype).reshape(tensor.shape[1:])


def _join(planes: Sequence[_Bytes], dtype: torch.dtype, *, out: _Bytes) -> None:
    """Write the words of planes, lowest bytes first, as bytes."""
    width = len(planes)
    words = out.view(_WORDS[width])
    for start in range(0, len(words), _CHUNK):
        part = slice(start, start + _CHUNK)
        words[part] = _words([plane[part] for plane in planes], dtype)


def _words(planes: Sequence[_Bytes] | _Bytes, dtype: torch.dtype) -> NDArray[Any]:
    """Return the words of planes, lowest bytes first."""
    width = len(planes)
    moved: NDArray[Any] = planes[0].astype(_WORDS[width])
    for place in range(1, width):
        moved |= planes[place].astype(_WORDS[width]) << (8 * place)
    if dtype in REAL_DTYPES:
        words: NDArray[Any] = (moved >> 1) | (moved << (8 * width - 1))
    else:
        words = (moved >> 1) ^ np.negative(moved & 1)
    return words
