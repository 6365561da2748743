"""Coded tensors that a stage may use up while it decodes, so that memory is not needed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.dtypes import byte_size
from fedpara_plugins.stages.stage import Tensors, check_limit

__all__ = [
    "CHUNK",
    "HandedOver",
    "check_decoded",
    "decode_each",
    "in_chunks",
    "may_overwrite",
    "take",
    "working_limit",
]

SMALL = 2**16
"""Bytes below which memory is rather allocated than written over: the look-up would cost more."""
CHUNK = 2**18
"""Values that are computed at a time where the arithmetic is wider than the result."""

WORKING_SLACK = 10 * 2**20
"""Bytes that decoding may need beyond one and a half times the limit: chunks, buffers of a
decompressor, the header's objects."""


def working_limit(limit: int) -> int:
    """Return the bytes that decoding may take in all, tensors included, at a limit of tensors."""
    return limit + limit // 2 + WORKING_SLACK


class HandedOver(dict[str, torch.Tensor]):
    """Tensors that belong to the stage that decodes them.

    The stage takes them out one by one (`take`), which frees each as soon as it is decoded. It may
    write a result over a tensor that is not lent (`may_overwrite`).

    Args:
        tensors: by name, in order.
        lent: addresses of the memory that others use, such as that of the received bytes.
        working: bytes that these tensors and what is made of them may take together.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], *, lent: frozenset[int], working: int
    ) -> None:
        super().__init__(tensors)
        self.lent = lent
        self.working = working

    def is_lent(self, tensor: torch.Tensor) -> bool:
        """Return whether others use the tensor's memory."""
        return tensor.untyped_storage().data_ptr() in self.lent

    def fits(self, size: int) -> bool:
        """Return whether these tensors and ``size`` bytes more may be in memory together."""
        return size + sum(tensor.nbytes for tensor in self.values()) <= self.working

    def check_peak(self, sizes: Sequence[int], what: str, *, held: int = 0) -> None:
        """Raise if decoding one tensor after the other takes too much at any time.

        Args:
            sizes: for each of the first tensors, the bytes that decoding it allocates; those that
                have none stay until the end.
            what: is decoded, for the message.
            held: bytes that stay until the end besides these tensors.

        Raises:
            PayloadError: what is coded and what is decoded take too much together.
        """
        coded = [0 if self.is_lent(tensor) else tensor.nbytes for tensor in self.values()]
        alive = most = sum(coded) + held
        for size, freed in zip(sizes, coded, strict=False):
            alive += size
            most = max(most, alive)
            alive -= freed if size else 0
        if most > self.working:
            raise PayloadError(
                f"{what} would take {most} bytes of memory while they are decoded, more than the "
                f"{self.working} bytes that this side's own model allows: the payload is of "
                "another model, or forged"
            )


def take(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a tensor, and remove it if the caller may use it up."""
    return tensors.pop(name) if isinstance(tensors, HandedOver) else tensors[name]


def may_overwrite(tensors: Mapping[str, torch.Tensor], tensor: torch.Tensor) -> bool:
    """Return whether a stage may write its result into a tensor's memory."""
    return (
        tensor.nbytes >= SMALL
        and isinstance(tensors, HandedOver)
        and tensor.is_contiguous()
        and not tensors.is_lent(tensor)
    )


def check_decoded(
    tensors: Tensors,
    dtypes: Sequence[torch.dtype | None],
    limit: int,
    what: str,
    *,
    in_place: Callable[[torch.Tensor, torch.dtype], bool] = lambda tensor, dtype: False,
    held: int = 0,
) -> None:
    """Raise if decoded tensors of the same shapes exceed the limit, or take too much memory.

    Args:
        tensors: the coded ones.
        dtypes: for each tensor the dtype that it gets; None if it passes unchanged.
        limit: bytes that the decoded tensors may have.
        what: is decoded, for the message.
        in_place: whether the values will be written over a tensor.
        held: bytes that stay until the end besides these tensors.

    Raises:
        PayloadError: they do.
    """
    pairs = list(zip(tensors.values(), dtypes, strict=True))
    size = sum((to or x.dtype).itemsize * x.numel() for x, to in pairs)
    check_limit(size, limit, what)
    if isinstance(tensors, HandedOver) and not tensors.fits(size + held):
        sizes = [0 if to is None or in_place(x, to) else byte_size(to, x.shape) for x, to in pairs]
        tensors.check_peak(sizes, what, held=held)


def decode_each(
    tensors: Tensors,
    dtypes: Sequence[torch.dtype | None],
    decode: Callable[[str, torch.Tensor, torch.dtype], torch.Tensor],
) -> Tensors:
    """Return decoded tensors, and those without a dtype as they are.

    Args:
        tensors: the coded ones; used up if they are `HandedOver`.
        dtypes: for each tensor, as for `check_decoded`.
        decode: returns the decoded tensor, given name, coded tensor and dtype.
    """
    decoded: Tensors = {}
    for name, dtype in zip(list(tensors), dtypes, strict=True):
        tensor = take(tensors, name)
        decoded[name] = tensor if dtype is None else decode(name, tensor, dtype)
    return decoded


def in_chunks(*flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same part of each of several tensors of one dimension and equal length."""
    if len(flat[0]) <= CHUNK:
        return iter([flat])
    return zip(*(torch.split(tensor, CHUNK) for tensor in flat), strict=True)
