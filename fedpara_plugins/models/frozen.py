"""Frozen tensors of a model: those that no training changes, so that both sides can hold them."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["frozen_tensors"]


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
