"""Stage ``grid``: the exact difference of two states that lie on a grid of power-of-two steps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.delta import counterpart
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
    tensor_bytes,
    unpack_dtypes,
)

__all__ = ["GridStage"]

LARGEST_EXPONENT = 1000
"""Of a step, either sign: powers of two far inside float64, where all arithmetic is done."""
_SYMBOLS = (torch.int8, torch.int16, torch.int32)
_PART = 2**16
"""Values that are computed at a time."""


class GridStage(Stage):
    """k = (x - r) / 2^e on the way out, x = r + k 2^e on arrival, exactly; x = r where k = 0.

    For each tensor, e is the largest exponent with which all k are integers, found from the values
    themselves. Acts on float16, bfloat16, float32 and float64 tensors of at least one dimension; a
    tensor for which every such e gives symbols of more than 32 bits or wider than its values, or
    that would not come back bit by bit (a new negative zero, NaN), passes unchanged, as do all
    other tensors. So the stage is lossless for every input, and small for states that were
    published on a grid (`fedpara_plugins.references.GridDownlink`). Symbols are int8, int16 or
    int32, the narrowest that holds all of a tensor's.

    Notes: ``dtypes`` and ``each`` (see `pack_dtypes`; ``-`` for a tensor passed unchanged) and
    ``exponents``: e for each tensor that was coded, in order.
    """

    name = "grid"
    lossless = True
    needs_reference = True

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Subtract the reference and divide by the step.

        Raises:
            MismatchError: the reference lacks a tensor or has it in another shape or dtype.
        """
        coded: Tensors = {}
        dtypes: list[torch.dtype | None] = []
        exponents: list[int] = []
        for name, tensor in tensors.items():
            found = None
            if tensor.dtype in REAL_DTYPES and tensor.ndim:
                found = _steps(tensor, counterpart(name, tensor, reference))
            dtypes.append(None if found is None else tensor.dtype)
            coded[name] = tensor if found is None else found[0]
            if found is not None:
                exponents.append(found[1])
        return coded, {**pack_dtypes(dtypes), "exponents": exponents}

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Multiply by the step and add the reference.

        Raises:
            MismatchError: the reference lacks a tensor or has it in another shape or dtype.
            PayloadError: the notes do not fit the tensors, or the values exceed the limit.
        """
        check_notes(self.name, notes, {"dtypes": list, "each": str, "exponents": list})
        dtypes = unpack_dtypes(notes, len(tensors))
        exponents = _checked_exponents(notes["exponents"], sum(d is not None for d in dtypes))
        pairs = list(zip(tensors.values(), dtypes, strict=True))
        size = sum(byte_size(dtype or tensor.dtype, tensor.shape) for tensor, dtype in pairs)
        check_limit(size, limit, "the values behind the grid's symbols")
        decoded: Tensors = {}
        for name, (tensor, dtype) in zip(tensors, pairs, strict=True):
            decoded[name] = tensor
            if dtype is not None:
                _check_symbols(name, tensor, dtype)
                like = torch.empty(tensor.shape, dtype=dtype, device="meta")
                other = counterpart(name, like, reference)
                decoded[name] = _moved(other, tensor, next(exponents))
                _check_finite(name, decoded[name])
        return decoded


def _steps(tensor: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """Symbols and exponent; None if the pair does not lie on a usable grid."""
    difference = tensor.detach().double() - other.detach().double()
    if not bool(torch.isfinite(difference).all()):
        return None
    exponent = _common_exponent(difference)
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    symbols = difference * math.ldexp(1.0, -exponent)
    if symbols.numel() and float(symbols.abs().max()) >= 2**31:
        return None
    packed = _packed(symbols.long())
    if packed is None or packed.itemsize > tensor.itemsize:
        return None
    # The subtraction may have been rounded, and a negative zero has no symbol.
    exact = tensor_bytes(_moved(other, packed, exponent)) == tensor_bytes(tensor)
    return (packed, exponent) if exact else None


def _common_exponent(values: torch.Tensor) -> int:
    """The largest e with all values integer multiples of 2^e; 0 where all are zero."""
    moved = values[values != 0]
    if not moved.numel():
        return 0
    mantissas, exponents = torch.frexp(moved)
    bits = (mantissas * 2.0**53).long()
    lowest = bits & -bits
    # A power of two is exact as float64, and its frexp gives its exponent plus one.
    return int((torch.frexp(lowest.double())[1] - 1 + exponents - 53).min())


def _moved(other: torch.Tensor, symbols: torch.Tensor, exponent: int) -> torch.Tensor:
    step = math.ldexp(1.0, exponent)
    moved = other.detach().clone(memory_format=torch.contiguous_format)
    # In parts: float64 takes up to eight times the memory of what it stands for.
    for values, counts in zip(
        torch.split(moved.view(-1), _PART), torch.split(symbols.reshape(-1), _PART), strict=True
    ):
        sums = counts.double().mul_(step).add_(values.double()).to(other.dtype)
        # What has not moved keeps its bits: a negative zero plus zero would lose its sign.
        values.copy_(torch.where(counts == 0, values, sums))
    return moved


def _packed(symbols: torch.Tensor) -> torch.Tensor | None:
    """In the narrowest type that holds them all; None where there is none."""
    largest = int(symbols.abs().max()) if symbols.numel() else 0
    for dtype in _SYMBOLS:
        if largest <= torch.iinfo(dtype).max:
            return symbols.to(dtype)
    return None


def _check_symbols(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype not in REAL_DTYPES or tensor.dtype not in _SYMBOLS or not tensor.ndim:
        raise PayloadError(
            f"tensor {name!r}: expected symbols of int8, int16 or int32 for F16, BF16, F32 or F64, "
            f"got {tuple(tensor.shape)} {tensor.dtype} for {dtype_name(dtype)}"
        )


def _checked_exponents(exponents: list[object], count: int) -> Iterator[int]:
    if len(exponents) != count:
        raise PayloadError(f"stage 'grid': expected {count} exponents, got {len(exponents)}")
    for exponent in exponents:
        # bool is an int to isinstance, not to the wire.
        if type(exponent) is not int or abs(exponent) > LARGEST_EXPONENT:
            raise PayloadError(
                f"stage 'grid': expected exponents from -{LARGEST_EXPONENT} to {LARGEST_EXPONENT}, "
                f"got {str(exponent)[:40]!r}"
            )
        yield exponent


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    # One pass and no temporary; NaN and infinity both show in the ends.
    if tensor.numel() and not all(map(math.isfinite, torch.aminmax(tensor))):
        raise PayloadError(f"tensor {name!r}: the grid's steps lead beyond the largest number")
