"""Stage ``int8``: symmetric quantisation to one byte a value, with one scale for each tensor."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence

import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.checks import holds_infinity
from fedpara_plugins.stages.dtypes import (
    REAL_DTYPES,
    arithmetic_dtype,
    dtype_name,
    pack_dtypes,
    unpack_dtypes,
)
from fedpara_plugins.stages.handed_over import (
    HandedOver,
    check_decoded,
    decode_each,
    in_chunks,
)
from fedpara_plugins.stages.small_tensors import SMALL, batches, joined, parts_of
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_notes

__all__ = ["Int8Stage"]

LARGEST_SYMBOL = 127
_BOUNDS = {
    dtype: (torch.finfo(arithmetic_dtype(dtype)).tiny, torch.finfo(dtype).max)
    for dtype in REAL_DTYPES
}


class Int8Stage(Stage):
    """Symbols q = round(x / s) with s = max|x| / 127, from which x = q * s; |error| <= s / 2.

    Arithmetic is float32 (float64 for float64 tensors); the product is rounded once more to the
    tensor's dtype. Acts on float16, bfloat16, float32 and float64 tensors of at least one
    dimension; all others pass unchanged, and so does a tensor with infinities. Scales are rounded
    towards zero so that no decoded value exceeds the largest one sent, and are at least the
    smallest normal number.

    Notes: ``dtypes`` and ``each`` (see `pack_dtypes`; ``-`` for a tensor passed unchanged) and
    ``scales``: base64 of one little-endian float64 for each quantised tensor, in order.
    """

    name = "int8"
    lossless = False
    shortens = True
    owns_output = True

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Quantise.

        Raises:
            PayloadError: a tensor to be quantised holds NaN.
        """
        coded: Tensors = {}
        dtypes: list[torch.dtype | None] = []
        scales: list[float] = []
        for name, tensor in tensors.items():
            acts = tensor.dtype in REAL_DTYPES and tensor.ndim > 0
            if not acts or holds_infinity(name, tensor, "which int8 cannot carry"):
                coded[name] = tensor
                dtypes.append(None)
                continue
            scale = _scale(tensor)
            coded[name] = _quantise(tensor, scale)
            dtypes.append(tensor.dtype)
            scales.append(scale)
        packed = base64.b64encode(struct.pack(f"<{len(scales)}d", *scales)).decode("ascii")
        return coded, {**pack_dtypes(dtypes), "scales": packed}

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Multiply by the scales.

        Raises:
            PayloadError: the notes do not fit the tensors, or the values exceed the limit.
        """
        check_notes(self.name, notes, {"dtypes": list, "each": str, "scales": str})
        dtypes = unpack_dtypes(notes, len(tensors))
        check_decoded(tensors, dtypes, limit, "the values behind the int8 symbols")
        scales = iter(_unpack_scales(notes["scales"], sum(d is not None for d in dtypes)))
        each = [next(scales) if dtype is not None else 0.0 for dtype in dtypes]
        for (name, x), dtype, scale in zip(tensors.items(), dtypes, each, strict=True):
            if dtype is not None:
                _check(name, x, scale, dtype)
        done: Tensors = {}
        widest = 8 * sum(x.nbytes for x in tensors.values())
        if not isinstance(tensors, HandedOver) or tensors.fits(widest):
            done = _small_tensors(tensors, dtypes, each)
        left = iter([scale for scale, dtype in zip(each, dtypes, strict=True) if dtype])

        def decode(name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            scale = next(left)
            return done.pop(name) if name in done else _dequantise(name, x, scale, dtype)

        return decode_each(tensors, dtypes, decode)


def _small_tensors(
    tensors: Tensors, dtypes: Sequence[torch.dtype | None], scales: Sequence[float]
) -> Tensors:
    """Return the small tensors behind their symbols, many at a time.

    Raises:
        PayloadError: see `_check_symbols`.
    """
    kinds: dict[str, torch.dtype] = {}
    steps: dict[str, float] = {}
    for (name, tensor), dtype, scale in zip(tensors.items(), dtypes, scales, strict=True):
        if dtype is not None and 0 < tensor.nbytes <= SMALL:
            kinds[name], steps[name] = dtype, scale
    decoded: Tensors = {}
    for dtype, names in batches(tensors, kinds):
        near, counts = joined([tensors[name] for name in names])
        if int(near.min()) < -LARGEST_SYMBOL:
            for name in names:
                _check_symbols(name, tensors[name])
        exact = near.to(arithmetic_dtype(dtype))
        every = torch.tensor([steps[name] for name in names], dtype=exact.dtype)
        exact.mul_(torch.repeat_interleave(every, torch.from_numpy(counts)))
        shapes = [tensors[name].shape for name in names]
        decoded.update(zip(names, parts_of(exact.to(dtype), counts, shapes), strict=True))
    return decoded


def _scale(tensor: torch.Tensor) -> float:
    wide = arithmetic_dtype(tensor.dtype)
    smallest = torch.finfo(wide).tiny
    if tensor.numel() == 0:
        return smallest
    low, high = (float(end) for end in torch.aminmax(tensor.detach()))
    peak = max(-low, high)
    scale = torch.tensor(peak / LARGEST_SYMBOL, dtype=wide)
    if LARGEST_SYMBOL * float(scale) > peak:
        scale = torch.nextafter(scale, torch.zeros_like(scale))
    return max(float(scale), smallest)


def _quantise(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    steps = tensor.detach().to(arithmetic_dtype(tensor.dtype)) / scale
    return steps.round_().clamp_(-LARGEST_SYMBOL, LARGEST_SYMBOL).to(torch.int8)


def _unpack_scales(packed: str, count: int) -> list[float]:
    try:
        raw = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PayloadError(f"stage 'int8': the scales are not base64: {error}") from error
    if len(raw) != 8 * count:
        raise PayloadError(f"stage 'int8': expected {8 * count} bytes of scales, got {len(raw)}")
    return list(struct.unpack(f"<{count}d", raw))


def _check(name: str, tensor: torch.Tensor, scale: float, dtype: torch.dtype) -> None:
    """Raise unless the symbols have the right form, and the scale fits the dtype."""
    if tensor.dtype != torch.int8 or tensor.ndim == 0 or dtype not in REAL_DTYPES:
        raise PayloadError(
            f"tensor {name!r}: expected int8 symbols for F16, BF16, F32 or F64, got "
            f"{tuple(tensor.shape)} {tensor.dtype} for {dtype_name(dtype)}"
        )
    tiny, most = _BOUNDS[dtype]
    if not tiny <= scale or not LARGEST_SYMBOL * scale <= most:
        raise PayloadError(f"tensor {name!r}: the int8 scale {scale} does not fit {dtype}")


def _check_symbols(name: str, tensor: torch.Tensor) -> None:
    if tensor.numel() and int(tensor.min()) < -LARGEST_SYMBOL:
        raise PayloadError(f"tensor {name!r}: int8 symbols go from -127 to 127, got -128")


def _dequantise(name: str, tensor: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    _check_symbols(name, tensor)
    wide = arithmetic_dtype(dtype)
    if wide == dtype:
        return tensor.to(wide).mul_(scale)
    values = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    for symbols, chunk in in_chunks(tensor.reshape(-1), values.view(-1)):
        chunk.copy_(symbols.to(wide).mul_(scale))
    return values
