"""Factorised convolutions and transposed convolutions: the kernel is composed with a core.

The six classes differ in the dense class alone. Only the kernel is replaced: stride, padding,
padding mode, output padding, dilation and groups stay with the dense layer. A kernel of one element
(1x1) is composed as a matrix, without a core.
"""

from __future__ import annotations

from math import prod

from torch import nn

from fedpara_plugins.factors.plan import WeightSlot
from fedpara_plugins.layers.base import FactorisedLayer, composed

__all__ = [
    "ConvolutionMixin",
    "FactorisedConv1d",
    "FactorisedConv2d",
    "FactorisedConv3d",
    "FactorisedConvTranspose1d",
    "FactorisedConvTranspose2d",
    "FactorisedConvTranspose3d",
]


class ConvolutionMixin(FactorisedLayer):
    """A convolution whose kernel is composed at every forward (Proposition 3).

    The kernel's shape is (out, in / groups, k1, ...), or (in, out / groups, k1, ...) when
    transposed. X belongs to the first side and Y to the second. All groups share Y and the core.
    """

    weight = composed()

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """Return the kernel; torch takes its second side for the inputs, transposed or not."""
        shape = tuple(dense.get_parameter("weight").shape)
        fan_in = prod(shape[1:])
        # The default, kaiming_uniform_(a=sqrt(5)), has this variance.
        return [WeightSlot("weight", shape, fan_in, 1 / (3 * fan_in))]


class FactorisedConv1d(ConvolutionMixin, nn.Conv1d):
    """`nn.Conv1d` with a composed kernel (out, in / groups, k)."""

    kind = "conv1d"
    dense_class = nn.Conv1d


class FactorisedConv2d(ConvolutionMixin, nn.Conv2d):
    """`nn.Conv2d` with a composed kernel (out, in / groups, k1, k2)."""

    kind = "conv2d"
    dense_class = nn.Conv2d


class FactorisedConv3d(ConvolutionMixin, nn.Conv3d):
    """`nn.Conv3d` with a composed kernel (out, in / groups, k1, k2, k3)."""

    kind = "conv3d"
    dense_class = nn.Conv3d


class FactorisedConvTranspose1d(ConvolutionMixin, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a composed kernel (in, out / groups, k)."""

    kind = "conv_transpose1d"
    dense_class = nn.ConvTranspose1d


class FactorisedConvTranspose2d(ConvolutionMixin, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a composed kernel (in, out / groups, k1, k2)."""

    kind = "conv_transpose2d"
    dense_class = nn.ConvTranspose2d


class FactorisedConvTranspose3d(ConvolutionMixin, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with a composed kernel (in, out / groups, k1, k2, k3)."""

    kind = "conv_transpose3d"
    dense_class = nn.ConvTranspose3d
