"""Stage ``topk``: the largest values of each tensor and where they stand; zeros elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedpara_plugins.errors import ConfigError, PayloadError
from fedpara_plugins.stages.checks import free_name, is_shape
from fedpara_plugins.stages.options import known_options, number_text, real, whole
from fedpara_plugins.stages.stage import (
    REAL_DTYPES,
    Notes,
    Stage,
    Tensors,
    byte_size,
    check_limit,
    check_notes,
)

__all__ = ["TopkStage"]

FULL = 255
"""A byte of a gap that goes on in the next byte."""
_PART = 2**16
"""Bytes of gaps that are read at a time."""


@dataclass(frozen=True)
class TopkStage(Stage):
    """Keep the values of largest magnitude, with their positions as gaps; the rest becomes zero.

    Acts on float16, bfloat16, float32 and float64 tensors of two dimensions or more whose kept
    values and positions take fewer bytes than the whole; all others pass unchanged. Kept values
    travel under the tensor's name, in row-major order, with shape (1, number of them).

    A gap is the number of values left out since the kept one before: so many bytes of 255, and one
    byte below 255; the gap is their sum. The gaps of all tensors form one uint8 tensor, the last.

    Args:
        share: of each tensor's values that is kept, rounded up.
        count: number of values that are kept of each tensor, instead.

    Notes: ``shapes``: for each tensor its sizes, or null if it passed unchanged.
    """

    name = "topk"
    lossless = False
    selects = True

    share: float | None = 0.01
    count: int | None = None

    @property
    def options(self) -> Mapping[str, str]:
        """As in the codec's text."""
        if self.count is not None:
            return {"count": str(self.count)}
        return {"share": number_text(self.share or 0.0)}

    def with_options(self, options: Mapping[str, str]) -> TopkStage:
        """Option ``share`` or ``count``.

        Raises:
            ConfigError: unknown option, value out of range, or both.
        """
        known_options(self.name, options, ("share", "count"))
        if "share" in options and "count" in options:
            raise ConfigError("options 'share' and 'count' of 'topk' exclude each other")
        if "count" in options:
            return TopkStage(None, whole(self.name, "count", options["count"], 1, 2**31 - 1))
        return TopkStage(real(self.name, "share", options.get("share", "0.01"), 1e-6, 1))

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Select.

        Raises:
            PayloadError: a tensor to select from holds NaN or infinity.
        """
        coded: Tensors = {}
        shapes: list[list[int] | None] = []
        gaps = [np.empty(0, np.uint8)]
        for name, tensor in tensors.items():
            kept = self._kept(tensor)
            if kept is None:
                coded[name] = tensor
                shapes.append(None)
                continue
            _check_finite(name, tensor)
            flat = tensor.detach().reshape(-1)
            # float16 has no topk on a CPU in every version of torch.
            places = torch.topk(flat.abs().float(), kept, sorted=False).indices.sort().values
            coded[name] = flat[places].unsqueeze(0)
            shapes.append(list(tensor.shape))
            gaps.append(_gap_bytes(places.numpy()))
        coded[free_name("gaps", coded)] = torch.from_numpy(np.concatenate(gaps))
        return coded, {"shapes": shapes}

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Put the values back in their places.

        Raises:
            PayloadError: shapes or positions do not fit the values, or exceed the limit.
        """
        check_notes(self.name, notes, {"shapes": list})
        if not tensors:
            raise PayloadError("stage 'topk': the tensor of gaps is missing")
        kept = dict(tensors)
        gaps = kept.pop(next(reversed(kept)))
        shapes = _read_shapes(notes["shapes"], kept)
        pairs = list(zip(kept.values(), shapes, strict=True))
        size = sum(byte_size(x.dtype, x.shape if to is None else to) for x, to in pairs)
        check_limit(size, limit, "the tensors that values were selected from")
        counts = [x.numel() for x, shape in pairs if shape is not None]
        sizes = [math.prod(shape) for shape in shapes if shape is not None]
        places = _places(gaps, counts, sizes)
        return {
            name: tensor if shape is None else _spread(tensor, shape, next(places))
            for name, (tensor, shape) in zip(kept, pairs, strict=True)
        }

    def _kept(self, tensor: torch.Tensor) -> int | None:
        """How many values to keep, or None where that saves nothing."""
        if tensor.dtype not in REAL_DTYPES or tensor.ndim < 2 or tensor.numel() == 0:
            return None
        size = tensor.numel()
        kept = self.count or math.ceil((self.share or 0.0) * size)
        coded = kept * (tensor.dtype.itemsize + 1) + size // FULL
        return kept if kept < size and coded < tensor.nbytes else None


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not all(map(math.isfinite, torch.aminmax(tensor.detach()))):
        bad = int((~torch.isfinite(tensor)).sum())
        raise PayloadError(
            f"tensor {name!r}: {bad} of {tensor.numel()} values are NaN or infinite, among which "
            "'topk' finds no largest. Training has probably diverged: lower the learning rate or "
            "clip gradients; codec 'lossless' sends such values as they are"
        )


def _gap_bytes(places: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    gaps = np.diff(places, prepend=-1) - 1
    ends = np.cumsum(gaps // FULL + 1) - 1
    coded = np.full(ends[-1] + 1, FULL, np.uint8)
    coded[ends] = gaps % FULL
    return coded


def _read_shapes(shapes: list[object], kept: Tensors) -> list[list[int] | None]:
    if len(shapes) != len(kept):
        raise PayloadError(f"stage 'topk': {len(shapes)} shapes for {len(kept)} tensors")
    for shape, (name, tensor) in zip(shapes, kept.items(), strict=True):
        if shape is None:
            continue
        row = tensor.ndim == 2 and tensor.shape[0] == 1 and tensor.dtype in REAL_DTYPES
        if not (row and is_shape(shape)):
            raise PayloadError(
                f"tensor {name!r}: expected a row of values selected from a shape, got "
                f"{tuple(tensor.shape)} {tensor.dtype} for {str(shape)[:80]}"
            )
    return shapes  # type: ignore[return-value]  # checked just now


def _places(
    gaps: torch.Tensor, counts: Sequence[int], sizes: Sequence[int]
) -> Iterator[torch.Tensor]:
    """Positions of each tensor's values, all checked before the first is returned."""
    if gaps.dtype != torch.uint8 or gaps.ndim != 1:
        raise PayloadError(f"stage 'topk': gaps as {tuple(gaps.shape)} {gaps.dtype}")
    coded = gaps.numpy()
    kept, total = _measured(coded)
    if kept != sum(counts) or (len(coded) and coded[-1] == FULL):
        raise PayloadError(
            f"stage 'topk': {kept} positions in {len(coded)} bytes, {sum(counts)} values"
        )
    if total > sum(sizes):
        raise PayloadError(f"stage 'topk': positions up to {total} among {sum(sizes)} values")
    after = _after(coded, kept, np.int64 if total >= 2**31 else np.int32)
    found, start, base = [], 0, 0
    for count, size in zip(counts, sizes, strict=True):
        places = after[start : start + count]
        start += count
        if count:
            end = int(places[-1])
            places -= base + 1
            base = end
            if places[-1] >= size:
                raise PayloadError(
                    f"stage 'topk': position {places[-1]} in a tensor of {size} values"
                )
        found.append(torch.from_numpy(places))
    return iter(found)


def _measured(coded: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """How many gaps there are, and how many values they and their values pass over."""
    parts = [coded[start : start + _PART] for start in range(0, len(coded), _PART)]
    kept = sum(int(np.count_nonzero(part != FULL)) for part in parts)
    return kept, kept + sum(int(part.sum(dtype=np.int64)) for part in parts)


def _after(
    coded: npt.NDArray[np.uint8], kept: int, kind: type[np.signedinteger[Any]]
) -> npt.NDArray[np.signedinteger[Any]]:
    """Where each value ends among all tensors' values, were each to start where one ended."""
    after = np.empty(kept, dtype=kind)
    done = total = 0
    # In parts: sums of a hostile row of gaps would take many times the memory of the row.
    for start in range(0, len(coded), _PART):
        part = coded[start : start + _PART]
        ends = np.cumsum(part, dtype=np.int64)[part != FULL]
        after[done : done + len(ends)] = ends + np.arange(done + 1, done + len(ends) + 1) + total
        done += len(ends)
        total += int(part.sum(dtype=np.int64))
    return after


def _spread(values: torch.Tensor, shape: Sequence[int], places: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(math.prod(shape), dtype=values.dtype)
    for part, some in zip(
        torch.split(places, _PART), torch.split(values.reshape(-1), _PART), strict=True
    ):
        whole[part.long()] = some
    return whole.reshape(tuple(shape))
