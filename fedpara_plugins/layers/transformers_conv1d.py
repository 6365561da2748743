"""Factorised ``Conv1D`` of Hugging Face: y = x W + b with W (in, out) composed.

GPT-2 and related models use it in place of `nn.Linear`; its weight is transposed. This module
imports transformers. It is imported itself when transformers already is (`LazyLayer`), or when a
converted model is unpickled.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D  # type: ignore[import-not-found,unused-ignore]

from fedpara_plugins.factors.plan import WeightSlot
from fedpara_plugins.layers.base import FactorisedLayer, composed

__all__ = ["FactorisedConv1D"]

DEFAULT_STD = 0.02
"""Standard deviation of a fresh weight of any shape."""


class FactorisedConv1D(FactorisedLayer, Conv1D):  # type: ignore[misc,unused-ignore]
    """``transformers.pytorch_utils.Conv1D`` with a composed weight (Proposition 1)."""

    kind = "transformers_conv1d"
    dense_class = Conv1D
    weight = composed()
    # The dense class has a `__repr__` that leaves `extra_repr` out.
    __repr__ = nn.Module.__repr__

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """Return the one weight, shape (nx, nf) with inputs first; X belongs to the inputs."""
        shape = tuple(dense.get_parameter("weight").shape)
        return [WeightSlot("weight", shape, shape[0], DEFAULT_STD**2)]

    def extra_repr(self) -> str:
        """Return the dense layer's sizes, then method and rank."""
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr()}"
