"""Parameters that a step leaves out, under a wrapper that moves parameters before the step.

``ScheduleFreeWrapper`` of the package ``schedulefree`` trains by a step of any optimizer. Between
steps a parameter is y, an average of z, which the optimizer moves, and x, the mean of all z. For
the time of the optimizer's step the wrapper puts z into the parameter, and x into the place of z.
It leaves a parameter without a gradient alone. Which ones have none is known only when the
optimizer steps, so for those the exchange is taken back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fedpara_plugins.training.real_steps import Step

__all__ = ["take_back_averaging"]

WRAPPER = "ScheduleFreeWrapper"
"""Matched by name, among the base classes too: the core imports no such package.

``ScheduleFreeWrapperReference`` needs nothing: it makes no difference between parameters with and
without a gradient.
"""


def take_back_averaging(step: Step, parameters: Iterable[Tensor], left_out: set[int]) -> None:
    """Give parameters that a step leaves out the value that they had before their wrapper's step.

    Args:
        step: a step, with or without a wrapper around it.
        parameters: of its optimizer. Those with a gradient were moved.
        left_out: ids of the parameters that the step leaves out.
    """
    moved = {id(p) for p in parameters if id(p) in left_out and p.grad is not None}
    wrapper = _wrapper_of(step) if moved else None
    if wrapper is None:
        return
    for group in step.optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in moved:
                _take_back(wrapper, parameter, float(group["lr"]))


def _wrapper_of(step: Step) -> Any:
    for _, owner in step.callers():
        if any(kind.__name__ == WRAPPER for kind in type(owner).__mro__):
            return owner
    return None


@torch.no_grad()
def _take_back(wrapper: Any, parameter: Tensor, lr: float) -> None:
    state = wrapper.state[parameter]
    z, x = parameter.clone(), state["z"]
    parameter.copy_(x.lerp(z, 1 - wrapper.momentum))
    if wrapper.weight_decay_at_y:
        decay = lr * wrapper.weight_decay_at_y
        parameter.div_(1 - decay * (1 - wrapper.momentum))
        z.add_(parameter, alpha=decay)
    elif torch.equal(x, z):
        del state["z"]  # it was made for this step, or says nothing that the parameter does not
        return
    x.copy_(z)
