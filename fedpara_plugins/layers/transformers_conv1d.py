"""Hugging Face's ``Conv1D`` from factors: y = x W + b with W (in, out) composed.

GPT-2 and its kin use it where others use `nn.Linear`; its weight stands the other way round. This
module imports transformers, and is itself imported only where transformers already is (`LazyLayer`)
or where a converted model is unpickled.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D  # type: ignore[import-not-found,unused-ignore]

from fedpara_plugins.factors.plan import WeightSlot
from fedpara_plugins.layers.base import FactorisedLayer, composed

__all__ = ["FactorisedConv1D"]

DEFAULT_STD = 0.02
"""Of a fresh weight, whatever its shape."""


class FactorisedConv1D(FactorisedLayer, Conv1D):  # type: ignore[misc,unused-ignore]
    """``transformers.pytorch_utils.Conv1D`` with a composed weight (Proposition 1)."""

    kind = "transformers_conv1d"
    dense_class = Conv1D
    weight = composed()
    # The dense class writes its own without the text of `extra_repr`.
    __repr__ = nn.Module.__repr__

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """One weight of shape (nx, nf), inputs first; X belongs to the inputs."""
        shape = tuple(dense.get_parameter("weight").shape)
        return [WeightSlot("weight", shape, shape[0], DEFAULT_STD**2)]

    def extra_repr(self) -> str:
        """The dense layer's sizes, then method and rank."""
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr()}"
