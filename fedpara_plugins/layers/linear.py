"""Factorised `nn.Linear`: y = x Wᵀ + b with W (out, in) composed."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from fedpara_plugins.factors.fast.linear import linear_from_factors
from fedpara_plugins.factors.fast.linear_residual import linear_with_update
from fedpara_plugins.factors.plan import WeightPlan, WeightSlot
from fedpara_plugins.layers.base import FactorisedLayer, composed
from fedpara_plugins.layers.kept_weights import kept_weight
from fedpara_plugins.support.torch_seams import is_symbolically_tracing

__all__ = ["FactorisedLinear"]


class FactorisedLinear(FactorisedLayer, nn.Linear):
    """A linear layer whose weight is composed at every forward (Proposition 1).

    For few inputs, and for weights too large for the cache, the output is computed from the factors
    directly, with the same result; see `fedpara_plugins.factors.fast.linear`. In the residual form
    of low rank it always is (`fedpara_plugins.factors.fast.linear_residual`).
    """

    kind = "linear"
    dense_class = nn.Linear
    may_skip_composing = True
    weight = composed()

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """Return the one weight, shape (out_features, in_features)."""
        assert isinstance(dense, nn.Linear)
        fan_in = dense.in_features
        shape = (dense.out_features, fan_in)
        # The default, kaiming_uniform_(a=sqrt(5)), has this variance.
        return [WeightSlot("weight", shape, fan_in, 1 / (3 * fan_in), he=True)]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """Return the outputs, shape (..., out_features)."""
        plan = self.plans.get("weight")
        if plan is None or self.on_composed is not None or is_symbolically_tracing():
            return linear(input, self.composed_weight("weight"), self.bias)
        kept = kept_weight(self, "weight")
        if kept is not None:
            # From the dictionary where possible, since `getattr` of a module takes long.
            own = self._parameters
            return linear(input, kept, own["bias"] if "bias" in own else self.bias)  # noqa: SIM401
        if plan.residual:
            return self._with_update(plan, input)
        output = linear_from_factors(plan, self.factors_now("weight"), input, self.bias)
        if output is not None:
            return output
        return linear(input, self.composed_weight("weight"), self.bias)

    def _with_update(self, plan: WeightPlan, inputs: Tensor) -> Tensor:
        base = self.base("weight")
        if base is None or not plan.adds_products:
            return linear(inputs, self.composed_weight("weight"), self.bias)
        return linear_with_update(plan, self.factors_now("weight"), base, inputs, self.bias)
