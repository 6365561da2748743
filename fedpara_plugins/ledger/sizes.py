"""The sizes of a message's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from fedpara_plugins.ledger.records import LayerSize

__all__ = ["layer_sizes"]


class DenseSizes(Protocol):
    """An object that knows the dense model's sizes, such as `fedpara_plugins.ModelSpec`."""

    def dense_bytes(self, state: Mapping[str, Tensor]) -> int:
        """Return the bytes of the same part of the dense model."""


def layer_sizes(shared: Mapping[str, Tensor], spec: DenseSizes) -> list[LayerSize]:
    """Return the sizes of a message's layers, in the model's order.

    A layer is the module that tensors belong to by their names.

    Args:
        shared: tensors of a message before encoding, by name.
        spec: the model that they belong to, for the dense sizes.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in shared.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = value
    return [
        LayerSize(
            layer=layer,
            tensors=len(tensors),
            raw_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            dense_bytes=spec.dense_bytes(tensors),
        )
        for layer, tensors in layers.items()
    ]
