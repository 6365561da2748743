"""`nn.Linear` from factors: y = x Wᵀ + b with W (out, in) composed."""

from __future__ import annotations

from torch import nn

from fedpara_plugins.layers.base import FactorisedLayer, composed
from fedpara_plugins.plan import WeightSlot

__all__ = ["FactorisedLinear"]


class FactorisedLinear(FactorisedLayer, nn.Linear):
    """A linear layer whose weight is composed at every forward (Proposition 1)."""

    kind = "linear"
    dense_class = nn.Linear
    weight = composed()

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """One weight of shape (out_features, in_features)."""
        assert isinstance(dense, nn.Linear)
        fan_in = dense.in_features
        shape = (dense.out_features, fan_in)
        # kaiming_uniform_(a=sqrt(5)), the layer's default, has this variance.
        return [WeightSlot("weight", shape, fan_in, 1 / (3 * fan_in))]
