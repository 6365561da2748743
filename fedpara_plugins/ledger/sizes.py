"""Sizes of a message's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from fedpara_plugins.ledger.records import (
    LayerSize,
)

__all__ = ["layer_sizes"]


class DenseSizes(Protocol):
    """What knows the dense model's sizes; `fedpara_plugins.ModelSpec` is one."""

    def dense_bytes(self, state: Mapping[str, Tensor]) -> int:
        """Return the bytes of the same part of the dense model."""


def layer_sizes(shared: Mapping[str, Tensor], spec: DenseSizes) -> list[LayerSize]:
    """The layers of a message by the module that their tensors stand in, in the model's order.

    Args:
        shared: tensors of a message before coding, by name.
        spec: the model that they belong to, for the dense sizes.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in shared.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = value
    return [
        LayerSize(
            layer=layer,
            tensors=len(tensors),
            raw_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
            dense_bytes=spec.dense_bytes(tensors),
        )
        for layer, tensors in layers.items()
    ]
