"""`nn.Bilinear` from factors: what a third party writes to add a kind of layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fedpara_plugins import hookimpl
from fedpara_plugins.plugins import FactorisedLayer, WeightSlot, composed


class FactorisedBilinear(FactorisedLayer, nn.Bilinear):
    """The weight (out, in1, in2) is composed like a kernel with in2 elements."""

    kind = "bilinear"
    dense_class = nn.Bilinear
    weight = composed()

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """Return one weight; its default is uniform in +-1/sqrt(in1)."""
        assert isinstance(dense, nn.Bilinear)
        shape = (dense.out_features, dense.in1_features, dense.in2_features)
        return [WeightSlot("weight", shape, dense.in1_features, 1 / (3 * dense.in1_features))]


@hookimpl
def fedpara_register_layers(register: Callable[[type[FactorisedLayer]], None]) -> None:
    """Register the kind."""
    register(FactorisedBilinear)
