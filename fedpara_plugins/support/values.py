"""Questions about the values of tensors of any dtype, in any place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

__all__ = ["has_values", "infinite", "nonfinite"]


def has_values(tensor: Tensor) -> bool:
    """Return whether there are values that could be NaN or infinite.

    Tensors that keep theirs in other tensors (quantised by torchao, sharded, fake) count as having
    none: most of them answer no such questions.
    """
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return False
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    floating = tensor.is_floating_point() or tensor.is_complex()
    return floating and not tensor.is_meta and tensor.layout == torch.strided


def nonfinite(tensor: Tensor) -> Tensor:
    """Return where a tensor is NaN or infinite; see `has_values`."""
    return ~torch.isfinite(_wide(tensor))


def infinite(tensor: Tensor) -> Tensor:
    """Return where a tensor is infinite; see `has_values`."""
    return torch.isinf(_wide(tensor))


def _wide(tensor: Tensor) -> Tensor:
    """Widen float8, which torch answers no such questions about; the values stay the same."""
    return tensor.float() if tensor.element_size() == 1 else tensor
