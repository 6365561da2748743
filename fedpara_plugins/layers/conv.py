"""Factorised convolutions and transposed convolutions: the kernel is composed with a core.

The six classes differ in the dense class alone. Only the kernel is replaced: stride, padding,
padding mode, output padding, dilation and groups stay with the dense layer. A kernel of one element
(1x1) is composed as a matrix, without a core.
"""

from __future__ import annotations

from math import prod

from torch import Tensor, nn
from torch.nn import functional

from fedpara_plugins.factors.compose import core_product
from fedpara_plugins.factors.fast.linear_residual import update_products
from fedpara_plugins.factors.plan import WeightPlan, WeightSlot
from fedpara_plugins.layers.base import FactorisedLayer, composed
from fedpara_plugins.support.torch_seams import convolve, is_symbolically_tracing

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
        return [WeightSlot("weight", shape, fan_in, 1 / (3 * fan_in), he=True)]


class PlainConvolutionMixin(ConvolutionMixin):
    """A convolution that is not transposed.

    In the residual form of low rank its update is never composed: a convolution with R filters and
    one of 1x1 follow each other, beside that with W0.
    """

    groups: int
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """Return the outputs, shape (batch, out, ...)."""
        plan = self.plans.get("weight")
        split = plan is not None and plan.residual and plan.adds_products and self.groups == 1
        if not split or self.must_compose("weight") or is_symbolically_tracing():
            # torch.compile of 2.4 cannot trace the descriptor, as which the dense forward reads it.
            return convolve(self, input, self.composed_weight("weight"), self.bias)
        assert plan is not None
        base = self.base("weight")
        assert base is not None
        return self._with_update(plan, base, input)

    def _with_update(self, plan: WeightPlan, base: Tensor, inputs: Tensor) -> Tensor:
        output = convolve(self, inputs, base, self.bias)
        point = (1,) * len(plan.shape[2:])
        one_by_one = _ONE_BY_ONE[len(point)]
        for x, y, t, multiplier in update_products(plan, self.factors_now("weight")):
            rows = y.T if t is None else core_product(y, t)
            filters = rows.reshape(plan.rank, *plan.shape[1:])  # (R, in, k1, ...)
            inner = convolve(self, inputs.to(y.dtype), filters, None)  # (batch, R, ...)
            outer = (x * multiplier).view(*x.shape, *point)
            output = output + one_by_one(inner, outer).to(output.dtype)
        return output


_ONE_BY_ONE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class FactorisedConv1d(PlainConvolutionMixin, nn.Conv1d):
    """`nn.Conv1d` with a composed kernel (out, in / groups, k)."""

    kind = "conv1d"
    dense_class = nn.Conv1d


class FactorisedConv2d(PlainConvolutionMixin, nn.Conv2d):
    """`nn.Conv2d` with a composed kernel (out, in / groups, k1, k2)."""

    kind = "conv2d"
    dense_class = nn.Conv2d


class FactorisedConv3d(PlainConvolutionMixin, nn.Conv3d):
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
