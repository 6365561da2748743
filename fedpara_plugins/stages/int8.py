"""Stage ``int8``: symmetric quantisation to one byte a value, one scale a tensor."""

from __future__ import annotations

import base64
import binascii
import math
import struct

import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.stage import (
    REAL_DTYPES,
    Notes,
    Stage,
    Tensors,
    byte_size,
    check_limit,
    check_notes,
    dtype_name,
    pack_dtypes,
    unpack_dtypes,
)

__all__ = ["Int8Stage"]

STEPS = 127


class Int8Stage(Stage):
    """q = round(x / s), x = q * s with s = max|x| / 127; |error| <= s / 2.

    Arithmetic is float32 (float64 for float64 tensors); the product is rounded once more to the
    tensor's dtype. Acts on float16, bfloat16, float32 and float64 tensors of at least one
    dimension; all others pass unchanged. Scales are rounded towards zero so that no decoded value
    exceeds the largest one sent, and are at least the smallest normal number.

    Notes: ``dtypes`` and ``each`` (see `pack_dtypes`; ``-`` for a tensor passed unchanged) and
    ``scales``: base64 of one little-endian float64 for each tensor that was quantised, in order.
    """

    name = "int8"
    lossless = False
    shortens = True

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Quantise.

        Raises:
            PayloadError: a tensor to be quantised holds NaN or infinity.
        """
        coded: Tensors = {}
        dtypes: list[torch.dtype | None] = []
        scales: list[float] = []
        for name, tensor in tensors.items():
            if tensor.dtype not in REAL_DTYPES or tensor.ndim == 0:
                coded[name] = tensor
                dtypes.append(None)
                continue
            scale = _scale(name, tensor)
            coded[name] = _symbols(tensor, scale)
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
        pairs = list(zip(tensors.values(), dtypes, strict=True))
        size = sum(byte_size(dtype or tensor.dtype, tensor.shape) for tensor, dtype in pairs)
        check_limit(size, limit, "the values behind the int8 symbols")
        scales = iter(_unpack_scales(notes["scales"], sum(d is not None for d in dtypes)))
        return {
            name: tensor if dtype is None else _values(name, tensor, next(scales), dtype)
            for name, (tensor, dtype) in zip(tensors, pairs, strict=True)
        }


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scale(name: str, tensor: torch.Tensor) -> float:
    wide = _arithmetic(tensor.dtype)
    smallest = torch.finfo(wide).tiny
    if tensor.numel() == 0:
        return smallest
    # One pass and no temporary; NaN and infinity both show in the result.
    low, high = (float(end) for end in torch.aminmax(tensor.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise PayloadError(
            f"tensor {name!r}: {bad} of {tensor.numel()} values are NaN or infinite, which int8 "
            "cannot carry. Training has probably diverged: lower the learning rate or clip "
            "gradients; codec 'lossless' sends such values as they are"
        )
    peak = max(-low, high)
    scale = torch.tensor(peak / STEPS, dtype=wide)
    if STEPS * float(scale) > peak:
        scale = torch.nextafter(scale, torch.zeros_like(scale))
    return max(float(scale), smallest)


def _symbols(tensor: torch.Tensor, scale: float) -> torch.Tensor:
    steps = tensor.detach().to(_arithmetic(tensor.dtype)) / scale
    return steps.round_().clamp_(-STEPS, STEPS).to(torch.int8)


def _unpack_scales(packed: str, count: int) -> list[float]:
    try:
        raw = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PayloadError(f"stage 'int8': the scales are not base64: {error}") from error
    if len(raw) != 8 * count:
        raise PayloadError(f"stage 'int8': expected {8 * count} bytes of scales, got {len(raw)}")
    return list(struct.unpack(f"<{count}d", raw))


def _values(name: str, tensor: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype != torch.int8 or tensor.ndim == 0 or dtype not in REAL_DTYPES:
        raise PayloadError(
            f"tensor {name!r}: expected int8 symbols for F16, BF16, F32 or F64, got "
            f"{tuple(tensor.shape)} {tensor.dtype} for {dtype_name(dtype)}"
        )
    wide = _arithmetic(dtype)
    peak = STEPS * scale
    if not torch.finfo(wide).tiny <= scale or not peak <= torch.finfo(dtype).max:
        raise PayloadError(f"tensor {name!r}: the int8 scale {scale} does not fit {dtype}")
    if tensor.numel() and int(tensor.min()) < -STEPS:
        raise PayloadError(f"tensor {name!r}: int8 symbols go from -127 to 127, got -128")
    return tensor.to(wide).mul_(scale).to(dtype)
