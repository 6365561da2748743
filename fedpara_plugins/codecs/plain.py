"""Tensors in the one form that stages and the container deal with."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.checks import MAX_DIMENSIONS, check_dimensions
from fedpara_plugins.stages.stage import Tensors, dtype_name

__all__ = ["plain", "unshared"]


def plain(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Detached, dense, contiguous, on the CPU; the same memory where that holds already.

    Raises:
        PayloadError: names and tensors are something else, or a tensor cannot travel.
    """
    found: Tensors = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise PayloadError(f"expected names and tensors, got {name!r}: {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise PayloadError(
                f"tensor {name!r}: expected a dense tensor with values, got layout {tensor.layout} "
                f"on {tensor.device}; call to_dense(), or load its values first"
            )
        dtype_name(tensor.dtype)
        check_dimensions(name, tensor.ndim, MAX_DIMENSIONS // 2)  # stages may add some
        tensor = tensor.detach().cpu()
        found[name] = tensor.resolve_conj().resolve_neg().contiguous()
    return found


def unshared(tensors: Tensors) -> Tensors:
    """Copies of those that share memory with an earlier one, which safetensors does not write."""
    seen: set[int] = set()
    apart: Tensors = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart
