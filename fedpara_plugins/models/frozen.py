"""Frozen tensors of a model: those that no training changes, so that both sides can hold them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

__all__ = ["frozen_tensors", "static_buffers"]

STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Names of buffers that training changes, in norms of any library."""

FEW = 64
"""Values of a buffer that costs nothing: it may be a counter or a scale, which training changes."""


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the frozen tensors of a model's state, by full name; they share its memory.

    These are the parameters that do not require gradients, and what quantised layers keep beside
    such a parameter (``weight.absmax``). Buffers are none: a BatchNorm counts in a frozen body too.
    Where no parameter requires gradients, nothing says which ones are trained, and none is frozen.

    Args:
        model: converted or not.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name for name, value in parameters.items() if not value.requires_grad}
    if len(frozen) == len(parameters):
        return {}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    beside = tuple(f"{name}." for name in frozen)
    return {
        name: value.detach()
        for name, value in model.state_dict().items()
        if name in frozen
        or (name not in parameters and name not in buffers and name.startswith(beside))
    }


def static_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a model's state that training is not expected to change, by full name.

    These are tables and masks: all buffers of 64 values and more but running statistics and what
    spectral norms keep. A model without trained parameters has none, as for `frozen_tensors`.

    Args:
        model: converted or not.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return {}
    state = model.state_dict()
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _NormBase | _SpectralNorm):
            continue
        for name, value in module.named_buffers(recurse=False, remove_duplicate=False):
            full = f"{path}.{name}" if path else name
            if full in state and name not in STATISTICS and value.numel() >= FEW:
                found[full] = value.detach()
    return found
