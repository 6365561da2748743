"""Conversion of a caller's tensors to the form that stages and the container take."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.checks import MAX_DIMENSIONS, check_dimensions
from fedpara_plugins.stages.dtypes import dtype_name
from fedpara_plugins.stages.stage import Tensors

__all__ = ["plain_tensors", "unshared"]


def plain_tensors(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return tensors detached, contiguous and on the CPU; they share memory if they are so already.

    Raises:
        PayloadError: a name is no text, a value is no tensor, or a tensor cannot be sent.
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
    """Return the tensors without shared memory, which safetensors does not write."""
    seen: set[int] = set()
    apart: Tensors = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart
