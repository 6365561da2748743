"""A client's round with ``local = "dense"``, in plain torch: no framework, no adapter.

The projection of one weight is the core's. Its own reference is dense least squares
(``tests/factors/projection``).
"""

from __future__ import annotations

import torch
from torch import nn

from fedpara_plugins import to_dense
from fedpara_plugins.factors.projection import project
from fedpara_plugins.plugins import FactorisedLayer
from harness.oracles.plain_loop import descend
from harness.oracles.task import TrainingTask

__all__ = ["descend_dense", "follow"]


def descend_dense(
    model: nn.Module, task: TrainingTask, client: int, server_round: int, mu: float | None
) -> float:
    """Train the composed dense model, then move the factors after it."""
    plain = task.net()
    plain.load_state_dict(to_dense(model).state_dict(), strict=True)
    loss = descend(plain, task, client, server_round, mu)
    follow(model, plain)
    return loss


@torch.no_grad()
def follow(model: nn.Module, trained: nn.Module) -> None:
    """Give a converted model the update of a dense one that started from the same weights."""
    before = dict(to_dense(model).state_dict())
    for name, layer in model.named_modules():
        twin = trained.get_submodule(name)
        for attribute, value in [*layer._parameters.items(), *layer._buffers.items()]:
            if value is not None and attribute in {**twin._parameters, **twin._buffers}:
                value.copy_(getattr(twin, attribute))
        if isinstance(layer, FactorisedLayer):
            for weight, plan in layer.plans.items():
                factors = layer.factors(weight)
                new = project(plan, factors, before[f"{name}.{weight}"], getattr(twin, weight))
                for factor, value in new.factors.items():
                    factors[factor].copy_(value)
