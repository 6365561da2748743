"""The model as a server holds it: W1, with private factors at zero.

A server never has private values. It fills the private factors of every reply with its own, the
same in all. Seeded values would be larger than weights, and rounding errors would hide the
distances between replies, which Krum computes in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpara_plugins.exchange.records import State
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.state_split import merge

__all__ = ["server_state", "zero_private_factors"]


def zero_private_factors(model: nn.Module) -> None:
    """Set the private factors of a converted model to zero, in place."""
    _zero(dict(model.named_parameters(remove_duplicate=False)), ModelSpec.of(model))


def server_state(spec: ModelSpec, shared: Mapping[str, Tensor]) -> State:
    """Return a model's complete state from its shared part, as every server has it.

    Args:
        spec: of the model.
        shared: its shared state.

    Raises:
        PayloadError: the shared state lacks a name, or has one too many.
    """
    private = spec.initial_private(shared)
    _zero(private, spec)
    return merge(spec, shared, private)


@torch.no_grad()
def _zero(tensors: Mapping[str, Tensor], spec: ModelSpec) -> None:
    for name in spec.private_factors:
        tensors[name].zero_()
