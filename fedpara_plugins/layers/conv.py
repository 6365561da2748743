"""`nn.Conv2d` from factors: the kernel (out, in/groups, k1, k2) is composed with a core."""

from __future__ import annotations

from math import prod

from torch import nn

from fedpara_plugins.layers.base import FactorisedLayer, composed
from fedpara_plugins.plan import WeightSlot

__all__ = ["FactorisedConv2d"]


class FactorisedConv2d(FactorisedLayer, nn.Conv2d):
    """A convolution whose kernel is composed at every forward (Proposition 3).

    Stride, padding, padding mode, dilation and groups are the dense layer's own business: only
    the kernel is replaced. A 1x1 kernel is composed as a matrix, without a core.
    """

    kind = "conv2d"
    dense_class = nn.Conv2d
    weight = composed()

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """One weight of shape (out_channels, in_channels / groups, k1, k2)."""
        assert isinstance(dense, nn.Conv2d)
        inputs = dense.in_channels // dense.groups
        shape = (dense.out_channels, inputs, *dense.kernel_size)
        fan_in = inputs * prod(dense.kernel_size)
        # kaiming_uniform_(a=sqrt(5)), the layer's default, has this variance.
        return [WeightSlot("weight", shape, fan_in, 1 / (3 * fan_in))]
