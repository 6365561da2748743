"""Stage ``delta``: the difference from a reference that both sides hold."""

from __future__ import annotations

import torch

from fedpara_plugins.codecs.stage import (
    REAL_DTYPES,
    Notes,
    Stage,
    Tensors,
    byte_size,
    check_limit,
    check_notes,
)
from fedpara_plugins.errors import MismatchError, PayloadError

__all__ = ["DeltaStage"]


class DeltaStage(Stage):
    """d = x - r on the way out, x = r + d on arrival; r is the reference's tensor of that name.

    Both are rounded once, to the tensor's own dtype, float16 and bfloat16 included: a wider
    difference would double the bytes of a half-precision model where no quantiser follows. A value
    comes back within eps * (|x| + |r|), exactly where x and r are within a factor 2 of each other
    (Sterbenz), so the stage is not lossless. Tensors that are not float16, bfloat16, float32 or
    float64 pass unchanged.
    """

    name = "delta"
    lossless = False
    needs_reference = True

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Subtract the reference.

        Raises:
            MismatchError: the reference lacks a tensor or has it in another shape or dtype.
            PayloadError: a difference of finite values overflows the dtype.
        """
        coded: Tensors = {}
        for name, tensor in tensors.items():
            if tensor.dtype in REAL_DTYPES:
                coded[name] = tensor - _counterpart(name, tensor, reference)
                _check_overflow(name, tensor, coded[name])
            else:
                coded[name] = tensor
        return coded, {}

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Add the reference.

        Raises:
            MismatchError: the reference lacks a tensor or has it in another shape or dtype.
            PayloadError: the tensors exceed the limit.
        """
        check_notes(self.name, notes, {})
        size = sum(byte_size(tensor.dtype, tensor.shape) for tensor in tensors.values())
        check_limit(size, limit, "the sum of reference and delta")
        return {
            name: _counterpart(name, tensor, reference) + tensor
            if tensor.dtype in REAL_DTYPES
            else tensor
            for name, tensor in tensors.items()
        }


def _counterpart(name: str, tensor: torch.Tensor, reference: Tensors | None) -> torch.Tensor:
    if reference is None:
        raise MismatchError(
            f"tensor {name!r} is coded against a reference and this side gave none; "
            "pass the tensors that the other side coded against"
        )
    if name not in reference:
        raise MismatchError(
            f"tensor {name!r} is not in the reference, which holds {len(reference)} tensors: "
            "sender and receiver convert different models, or with different options"
        )
    other = reference[name]
    if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
        raise MismatchError(
            f"tensor {name!r} is {tuple(tensor.shape)} {tensor.dtype}, in the reference "
            f"{tuple(other.shape)} {other.dtype}: both sides need the same method and rank"
        )
    return other


def _check_overflow(name: str, tensor: torch.Tensor, delta: torch.Tensor) -> None:
    lost = ~torch.isfinite(delta)
    if not bool(lost.any()):
        return
    count = int((lost & torch.isfinite(tensor)).sum())
    if count:
        raise PayloadError(
            f"tensor {name!r}: {count} of {tensor.numel()} finite values have no finite difference "
            f"from the reference in {tensor.dtype}; check the reference, or use codec 'lossless'"
        )
