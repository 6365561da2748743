"""Stage ``topk``: the largest values of each tensor and their positions; all others become zero."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedpara_plugins.errors import ConfigError, PayloadError
from fedpara_plugins.stages.checks import holds_infinity, is_shape, unused_name
from fedpara_plugins.stages.dtypes import REAL_DTYPES, byte_size
from fedpara_plugins.stages.handed_over import HandedOver, take
from fedpara_plugins.stages.options import (
    check_option_names,
    number_text,
    read_integer,
    read_number,
)
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_limit, check_notes

__all__ = ["TopkStage"]

CONTINUED = 255
"""A byte of a gap that continues in the next byte."""
_CHUNK = 2**16
"""Bytes of gaps that are read at a time."""


@dataclass(frozen=True)
class TopkStage(Stage):
    """The values of largest magnitude, with their positions as gaps; the rest becomes zero.

    Acts on float16, bfloat16, float32 and float64 tensors of two dimensions or more whose kept
    values and positions take fewer bytes than the whole, and that hold no infinities; all others
    pass unchanged. Kept values are sent under the tensor's name, in row-major order, with shape
    (1, number of values).

    A gap is the number of values left out since the previous kept one. It is written as any number
    of bytes 255 and one byte below 255; their sum is the gap. The gaps of all tensors form one
    uint8 tensor, the last.

    Args:
        share: share of each tensor's values to keep; the number is rounded up.
        count: number of values of each tensor to keep; it replaces ``share``.

    Notes: ``shapes``: for each tensor its sizes, or null if it passed unchanged.
    """

    name = "topk"
    lossless = False
    selects = True
    owns_output = True

    share: float | None = 0.01
    count: int | None = None

    @property
    def options(self) -> Mapping[str, str]:
        """Options as in the codec's text."""
        if self.count is not None:
            return {"count": str(self.count)}
        return {"share": number_text(self.share or 0.0)}

    def with_options(self, options: Mapping[str, str]) -> TopkStage:
        """Return a stage with the option ``share`` or ``count``.

        Raises:
            ConfigError: unknown option, value out of range, or both options.
        """
        check_option_names(self.name, options, ("share", "count"))
        if "share" in options and "count" in options:
            raise ConfigError("options 'share' and 'count' of 'topk' exclude each other")
        if "count" in options:
            return TopkStage(None, read_integer(self.name, "count", options["count"], 1, 2**31 - 1))
        return TopkStage(read_number(self.name, "share", options.get("share", "0.01"), 1e-6, 1))

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Select the largest values.

        Raises:
            PayloadError: a tensor to select from holds NaN.
        """
        coded: Tensors = {}
        shapes: list[list[int] | None] = []
        gaps = [np.empty(0, np.uint8)]
        for name, tensor in tensors.items():
            kept = self._number_kept(tensor)
            if kept is None or holds_infinity(name, tensor, "among which 'topk' finds no largest"):
                coded[name] = tensor
                shapes.append(None)
                continue
            flat = tensor.detach().reshape(-1)
            # Not every version of torch has topk of float16 on a CPU.
            positions = torch.topk(flat.abs().float(), kept, sorted=False).indices.sort().values
            coded[name] = flat[positions].unsqueeze(0)
            shapes.append(list(tensor.shape))
            gaps.append(_gap_bytes(positions.numpy()))
        coded[unused_name("gaps", coded)] = torch.from_numpy(np.concatenate(gaps))
        return coded, {"shapes": shapes}

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Put the values back at their positions.

        Raises:
            PayloadError: shapes or positions do not fit the values, or exceed the limit.
        """
        check_notes(self.name, notes, {"shapes": list})
        if not tensors:
            raise PayloadError("stage 'topk': the tensor of gaps is missing")
        kept = tensors if isinstance(tensors, HandedOver) else dict(tensors)
        gaps = kept.pop(next(reversed(kept)))
        shapes = _read_shapes(notes["shapes"], kept)
        pairs = list(zip(kept.values(), shapes, strict=True))
        what = "the tensors that values were selected from"
        size = sum(byte_size(x.dtype, x.shape if to is None else to) for x, to in pairs)
        check_limit(size, limit, what)
        if isinstance(kept, HandedOver) and not kept.fits(size + gaps.nbytes):
            sizes = [0 if to is None else byte_size(x.dtype, to) for x, to in pairs]
            kept.check_peak(sizes, what, held=gaps.nbytes)
        chosen = [(x.numel(), math.prod(to)) for x, to in pairs if to is not None]
        positions = _Positions(gaps, chosen)
        del pairs  # would keep alive what is used up
        decoded: Tensors = {}
        for name, shape in zip(list(kept), shapes, strict=True):
            tensor = take(kept, name)
            decoded[name] = tensor if shape is None else _scatter(tensor, shape, positions)
        return decoded

    def _number_kept(self, tensor: torch.Tensor) -> int | None:
        """Return how many values to keep; None if that saves nothing."""
        if tensor.dtype not in REAL_DTYPES or tensor.ndim < 2 or tensor.numel() == 0:
            return None
        size = tensor.numel()
        kept = self.count or math.ceil((self.share or 0.0) * size)
        coded = kept * (tensor.dtype.itemsize + 1) + size // CONTINUED
        return kept if kept < size and coded < tensor.nbytes else None


def _gap_bytes(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum(gaps // CONTINUED + 1) - 1
    coded = np.full(ends[-1] + 1, CONTINUED, np.uint8)
    coded[ends] = gaps % CONTINUED
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


class _Positions:
    """The positions of kept values, tensor after tensor, read from their gaps.

    Args:
        gaps: as in the payload.
        chosen: for each tensor that values were selected from, how many, and of how many.

    Raises:
        PayloadError: as many gaps as values are not there, or they lead beyond the last tensor.
    """

    def __init__(self, gaps: torch.Tensor, chosen: Sequence[tuple[int, int]]) -> None:
        if gaps.dtype != torch.uint8 or gaps.ndim != 1:
            raise PayloadError(f"stage 'topk': gaps as {tuple(gaps.shape)} {gaps.dtype}")
        coded = gaps.numpy()
        kept, total = _measure(coded)
        count, size = sum(kept for kept, _ in chosen), sum(size for _, size in chosen)
        if kept != count or (len(coded) and coded[-1] == CONTINUED):
            raise PayloadError(
                f"stage 'topk': {kept} positions in {len(coded)} bytes, {count} values"
            )
        if total > size:
            raise PayloadError(f"stage 'topk': positions up to {total} among {size} values")
        self._ends = _ends(coded)
        self._left = np.empty(0, np.int64)
        self._base = 0

    def take(self, count: int, size: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the positions of a tensor's values, in parts.

        Args:
            count: number of kept values.
            size: number of all values.

        Raises:
            PayloadError: a position is not in the tensor.
        """
        base = self._base
        while count:
            if not len(self._left):
                self._left = next(self._ends)
                continue
            part, self._left = self._left[:count], self._left[count:]
            count -= len(part)
            self._base = int(part[-1])
            if self._base - base > size:
                raise PayloadError(
                    f"stage 'topk': position {self._base - base - 1} in a tensor of {size} values"
                )
            yield part - (base + 1)


def _measure(coded: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """Return the number of gaps, and the number of values that gaps and kept values cover."""
    chunks = [coded[start : start + _CHUNK] for start in range(0, len(coded), _CHUNK)]
    kept = sum(int(np.count_nonzero(chunk != CONTINUED)) for chunk in chunks)
    return kept, kept + sum(int(chunk.sum(dtype=np.int64)) for chunk in chunks)


def _ends(coded: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the position after each kept value, as if every tensor began after a kept value."""
    done = total = 0
    # In chunks: sums over all gaps would take many times the memory of the gaps.
    for start in range(0, len(coded), _CHUNK):
        chunk = coded[start : start + _CHUNK]
        sums = np.cumsum(chunk, dtype=np.int64)
        ends = sums[chunk != CONTINUED]
        ends += np.arange(done + 1 + total, done + 1 + total + len(ends))
        done += len(ends)
        total += int(sums[-1])
        yield ends


def _scatter(values: torch.Tensor, shape: Sequence[int], positions: _Positions) -> torch.Tensor:
    """Return zeros with the values at the next positions."""
    whole = torch.zeros(math.prod(shape), dtype=values.dtype, device="cpu")
    flat, done = values.reshape(-1), 0
    for places in positions.take(len(flat), len(whole)):
        whole[torch.from_numpy(places)] = flat[done : done + len(places)]
        done += len(places)
    return whole.reshape(tuple(shape))
