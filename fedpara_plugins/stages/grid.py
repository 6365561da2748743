"""Stage ``grid``: the exact difference of two states that lie on a grid of power-of-two steps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.checks import all_finite
from fedpara_plugins.stages.delta import reference_tensor
from fedpara_plugins.stages.dtypes import (
    REAL_DTYPES,
    SYMBOL_DTYPES,
    dtype_name,
    pack_dtypes,
    tensor_bytes,
    unpack_dtypes,
)
from fedpara_plugins.stages.handed_over import check_decoded, decode_each, may_overwrite
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_notes

__all__ = ["GridStage"]

LARGEST_EXPONENT = 1000
"""Largest magnitude of a step's exponent: such powers of two are far inside float64's range."""
_CHUNK = 2**16
"""Values that are computed at a time."""


class GridStage(Stage):
    """Symbols k = (x - r) / 2^e, from which x = r + k 2^e; both exact, and x = r where k = 0.

    r is the reference's tensor of the same name. For each tensor, e is the largest exponent with
    which all k are integers, found from the values themselves. Acts on float16, bfloat16, float32
    and float64 tensors of at least one dimension. A tensor passes unchanged, as do all others, if
    every such e gives symbols k of more than 32 bits or wider than the values, or if decoding would
    change a bit (a new negative zero, NaN). So the stage is lossless for every input, and small for
    states that were published on a grid (`fedpara_plugins.references.GridDownlink`). The symbols of
    a tensor are int8, int16 or int32, the narrowest type that holds them all.

    Notes: ``dtypes`` and ``each`` (see `pack_dtypes`; ``-`` for a tensor passed unchanged) and
    ``exponents``: e for each encoded tensor, in order.
    """

    name = "grid"
    lossless = True
    needs_reference = True
    owns_output = True

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
                found = _to_symbols(tensor, reference_tensor(name, tensor, reference))
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

        def in_place(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
            return tensor.itemsize == dtype.itemsize and may_overwrite(tensors, tensor)

        def decode(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            _check_symbols(name, tensor, dtype)
            like = torch.empty(tensor.shape, dtype=dtype, device="meta")
            other = reference_tensor(name, like, reference)
            own = in_place(tensor, dtype)
            out = (
                tensor.view(dtype) if own else torch.empty(tensor.shape, dtype=dtype, device="cpu")
            )
            _add_steps(other, tensor, next(exponents), out=out)
            _check_finite(name, out)
            return out

        what = "the values behind the grid's symbols"
        check_decoded(tensors, dtypes, limit, what, in_place=in_place)
        return decode_each(tensors, dtypes, decode)


def _to_symbols(tensor: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """Return symbols and exponent; None if the pair does not lie on a usable grid."""
    difference = tensor.detach().double() - other.detach().double()
    if not bool(torch.isfinite(difference).all()):
        return None
    exponent = _common_exponent(difference)
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    exact = difference * math.ldexp(1.0, -exponent)
    if exact.numel() and float(exact.abs().max()) >= 2**31:
        return None
    symbols = _narrowest(exact.long())
    if symbols is None or symbols.itemsize > tensor.itemsize:
        return None
    # The subtraction may have been rounded, and a negative zero has no symbol.
    moved = torch.empty(other.shape, dtype=other.dtype)
    _add_steps(other, symbols, exponent, out=moved)
    same = tensor_bytes(moved) == tensor_bytes(tensor)
    return (symbols, exponent) if same else None


def _common_exponent(values: torch.Tensor) -> int:
    """Return the largest e with all values integer multiples of 2^e; 0 if all are zero."""
    nonzero = values[values != 0]
    if not nonzero.numel():
        return 0
    mantissas, exponents = torch.frexp(nonzero)
    bits = (mantissas * 2.0**53).long()
    lowest = bits & -bits
    # A power of two is exact as float64, and frexp returns its exponent plus one.
    return int((torch.frexp(lowest.double())[1] - 1 + exponents - 53).min())


def _add_steps(
    other: torch.Tensor, symbols: torch.Tensor, exponent: int, *, out: torch.Tensor
) -> None:
    """Write the reference's tensor plus ``symbols`` steps of 2^exponent.

    Args:
        other: the reference's tensor.
        symbols: of the same shape.
        exponent: of the step.
        out: contiguous; may have the memory of the symbols.
    """
    step = math.ldexp(1.0, exponent)
    flat = (other.detach().reshape(-1), symbols.reshape(-1), out.view(-1))
    # In chunks: float64 takes up to eight times the memory of the symbols.
    for values, counts, chunk in zip(*(torch.split(x, _CHUNK) for x in flat), strict=True):
        sums = counts.double().mul_(step).add_(values.double()).to(other.dtype)
        # A value with symbol 0 keeps its bits: a negative zero plus zero would lose its sign.
        chunk.copy_(torch.where(counts == 0, values, sums))


def _narrowest(symbols: torch.Tensor) -> torch.Tensor | None:
    """Return the symbols in the narrowest type that holds them all; None if there is none."""
    largest = int(symbols.abs().max()) if symbols.numel() else 0
    for dtype in SYMBOL_DTYPES:
        if largest <= torch.iinfo(dtype).max:
            return symbols.to(dtype)
    return None


def _check_symbols(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype not in REAL_DTYPES or tensor.dtype not in SYMBOL_DTYPES or not tensor.ndim:
        raise PayloadError(
            f"tensor {name!r}: expected symbols of int8, int16 or int32 for F16, BF16, F32 or F64, "
            f"got {tuple(tensor.shape)} {tensor.dtype} for {dtype_name(dtype)}"
        )


def _checked_exponents(exponents: list[object], count: int) -> Iterator[int]:
    if len(exponents) != count:
        raise PayloadError(f"stage 'grid': expected {count} exponents, got {len(exponents)}")
    for exponent in exponents:
        # isinstance would accept True and False, which are no integers in JSON.
        if type(exponent) is not int or abs(exponent) > LARGEST_EXPONENT:
            raise PayloadError(
                f"stage 'grid': expected exponents from -{LARGEST_EXPONENT} to {LARGEST_EXPONENT}, "
                f"got {str(exponent)[:40]!r}"
            )
        yield exponent


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not all_finite(tensor):
        raise PayloadError(f"tensor {name!r}: the grid's steps lead beyond the largest number")
