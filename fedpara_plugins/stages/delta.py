"""Stage ``delta``: the difference from a reference that both sides hold."""

from __future__ import annotations

import torch

from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.stages.checks import all_finite
from fedpara_plugins.stages.dtypes import REAL_DTYPES, tensor_bytes
from fedpara_plugins.stages.handed_over import may_overwrite, take
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_limit, check_notes

__all__ = ["DeltaStage", "reference_tensor"]


class DeltaStage(Stage):
    """The difference d = x - r, with r the reference's tensor of the same name; x = r + d.

    Both results are rounded once to the tensor's own dtype, float16 and bfloat16 included: a wider
    difference would double the bytes of a half-precision model if no quantiser follows. A decoded
    value is within eps * (|x| + |r|) of the original, and exact if x and r are within a factor of 2
    of each other (Sterbenz's lemma). So the stage is not lossless. Where x and r are the same
    infinity, or both are NaN, as in a mask, d = 0. A tensor is sent whole if it has no dimensions
    and would not be exact, or if x or r has infinities or NaN where the other has something else;
    the notes list its place under ``whole``. Tensors that are not float16, bfloat16, float32 or
    float64 pass unchanged.
    """

    name = "delta"
    lossless = False
    needs_reference = True
    owns_output = True

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Subtract the reference.

        Raises:
            MismatchError: the reference lacks a tensor or has it in another shape or dtype.
            PayloadError: a difference of finite values overflows the dtype.
        """
        coded: Tensors = {}
        whole: list[int] = []
        for place, (name, tensor) in enumerate(tensors.items()):
            coded[name] = tensor
            if tensor.dtype not in REAL_DTYPES:
                continue
            delta = _difference(name, tensor, reference_tensor(name, tensor, reference))
            if delta is None:
                whole.append(place)
            else:
                coded[name] = delta
        return coded, {"whole": whole} if whole else {}

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Add the reference.

        Raises:
            MismatchError: the reference lacks a tensor or has it in another shape or dtype.
            PayloadError: the notes do not fit the tensors, or the tensors exceed the limit.
        """
        check_notes(self.name, notes, {"whole": list} if notes else {})
        whole = notes.get("whole", [])
        known = all(type(place) is int and 0 <= place < len(tensors) for place in whole)
        if not known or len(set(whole)) != len(whole):
            raise PayloadError(
                f"stage 'delta': expected different places among {len(tensors)} tensors, got "
                f"{whole[:5]}"
            )
        size = sum(tensor.nbytes for tensor in tensors.values())
        check_limit(size, limit, "the sum of reference and delta")
        exact = set(whole)
        decoded: Tensors = {}
        for place, name in enumerate(list(tensors)):
            tensor = take(tensors, name)
            if tensor.dtype in REAL_DTYPES and place not in exact:
                other = reference_tensor(name, tensor, reference).detach()
                own = may_overwrite(tensors, tensor)
                tensor = torch.add(other, tensor, out=tensor) if own else other + tensor
            decoded[name] = tensor
        return decoded


def reference_tensor(name: str, tensor: torch.Tensor, reference: Tensors | None) -> torch.Tensor:
    """Return the reference's tensor of this name.

    Args:
        name: the tensor's name.
        tensor: has the shape and dtype that the reference's tensor must have.
        reference: the tensors that both sides hold.

    Raises:
        MismatchError: there is no reference, it lacks the tensor, or shape or dtype differ.
    """
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


def _difference(name: str, tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """Return what leads from the reference's tensor to this one; None if no difference does.

    Raises:
        PayloadError: a difference of finite values overflows the dtype.
    """
    delta = tensor - other
    if tensor.ndim == 0 and tensor_bytes(other + delta) != tensor_bytes(tensor):
        return None
    if all_finite(delta):
        return delta
    lost = ~torch.isfinite(delta)
    count = int((lost & torch.isfinite(tensor) & torch.isfinite(other)).sum())
    if count:
        raise PayloadError(
            f"tensor {name!r}: {count} of {tensor.numel()} finite values have no finite difference "
            f"from the reference in {tensor.dtype}; check the reference, or use codec 'lossless'"
        )
    same = (tensor == other) | (torch.isnan(tensor) & torch.isnan(other))
    delta = delta.masked_fill(lost & same, 0.0)
    back = other + delta
    comes_back = (back == tensor) | torch.isnan(tensor) | ~lost
    return delta if bool(comes_back.all()) else None
