"""Conditions under which a hand-written function may run, and torch's own operations must.

The functions of this folder are ordinary nodes of autograd: they work with double backward,
checkpoints, hooks on saved tensors and autocast. What rewrites or records operations (the compiler,
`torch.func`, forward mode, tracing, tensor subclasses) gets torch's own operations instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.support.torch_seams import (
    are_functorch_transforms_active,
    count_dispatch_modes,
    in_forward_mode,
    is_legacy_batchedtensor,
    is_symbolically_tracing,
    is_tracing,
)

__all__ = [
    "FALLBACKS",
    "as_autocast_casts",
    "autocasts",
    "differentiates",
    "may_run",
    "rewritten",
    "without_autocast",
]

FALLBACKS = (
    "under torch.compile and torch.export, torch.func, forward-mode differentiation, torch.jit and "
    "torch.fx tracing, on the meta device, modes of dispatch (fake tensors, counters of "
    "operations), with gradients enabled in inference mode and for tensor subclasses weights are "
    "composed by torch's own operations"
)
"""Text for `fedpara doctor`."""

_PLAIN = (Tensor, nn.Parameter)


def rewritten() -> bool:
    """Return whether operations are now compiled, traced, transformed, dualised or unrecorded."""
    return (
        torch.compiler.is_compiling()
        or is_tracing()
        or is_symbolically_tracing()
        or are_functorch_transforms_active()
        or in_forward_mode()
        # Fake tensors, counters of operations and selective checkpoints must see operations.
        or count_dispatch_modes() > 0
        # In inference mode torch's own operations record nothing, even with gradients enabled
        # inside; a `Function` would.
        or (torch.is_inference_mode_enabled() and torch.is_grad_enabled())
    )


def differentiates(gradient: Tensor) -> bool:
    """Return whether a backward pass with this gradient must consist of torch's own operations.

    It must if the pass is differentiated again, is rewritten, or takes many gradients at once.
    """
    # `autograd.grad(..., is_grads_batched=True)` batches; it is no transform of torch.func.
    return torch.is_grad_enabled() or rewritten() or is_legacy_batchedtensor(gradient)


def may_run(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether a hand-written function may compute with these tensors (None: no tensor)."""
    if rewritten():
        return False
    first = tensors[0]
    if first is None or first.is_meta or not first.dtype.is_floating_point:
        return False
    dtype, device = first.dtype, first.device
    for tensor in tensors:  # a loop, since this runs before each layer and `all` takes longer
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.dtype is dtype and tensor.device == device
        ):
            return False
    return True


def autocasts(device: str) -> bool:
    """Return whether autocast is on for a type of device; the meta device has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast, for weights in place of parameters: those are not cast."""
    if autocasts(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def as_autocast_casts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cast the tensors as autocast does for a matrix product, if it is on.

    As there, float64 stays as it is. The cast is differentiable: gradients keep the old dtype.
    """
    device = tensors[0].device.type
    if not autocasts(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]
