"""The classification layer with a client's own part: y = x (W + H)ᵀ + b + p.

H corrects the weight for this client; it starts at zero and learns in private steps only. p holds
the logarithms of the client's label frequencies (`fedpara_plugins.set_label_counts`); it is never
trained. Both are private parameters, folded into weight and bias of the dense model.

Such a layer is not registered for a class of layers: `fedpara_plugins.convert` puts it in the place
of the one layer that the options ``private_head`` and ``label_prior`` are about.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers.base import FactorisedLayer
from fedpara_plugins.layers.linear import FactorisedLinear

__all__ = ["ADDED", "PersonalLinear"]

ADDED = {"correction": "weight", "label_prior": "bias"}
"""The private parameters of the layer, and what each is added to."""


class PersonalLinear(FactorisedLinear):
    """A linear layer, factorised or dense, with a private correction or label prior or both.

    ``weight`` and ``bias`` are the shared part alone, as in every other layer; what the layer adds
    to them is added in its forward.
    """

    kind = "linear head"

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        plans: Mapping[str, WeightPlan],
        *,
        name: str,
        seed: int,
        fit: bool = False,
        correction: bool = False,
        label_prior: bool = False,
    ) -> FactorisedLayer:
        """As for every kind, without plans too; the private parts start at zero.

        Args:
            dense: see `FactorisedLayer.from_dense`, also for the next four.
            plans: empty where the weight stays dense.
            name: of the layer.
            seed: of private factors.
            fit: start from the closest factors.
            correction: add H, (out_features, in_features), trained if the weight is.
            label_prior: add p, (out_features,); ``dense`` must have a bias.
        """
        layer = super().from_dense(dense, plans, name=name, seed=seed, fit=fit)
        for added, wanted in (("correction", correction), ("label_prior", label_prior)):
            if wanted:
                base = dense.get_parameter(ADDED[added])
                trained = added == "correction" and base.requires_grad
                zero = torch.zeros_like(base, requires_grad=False)
                layer._parameters[added] = nn.Parameter(zero, requires_grad=trained)
        return layer

    @property
    def added(self) -> dict[str, nn.Parameter]:
        """The private parts that this layer has, by their names in `ADDED`."""
        found = {name: self._parameters.get(name) for name in ADDED}
        return {name: value for name, value in found.items() if value is not None}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """Shape (..., out_features). In shared steps of training without H: what then travels."""
        weight = self.composed_weight("weight")
        bias: Tensor | None = self.bias
        added = self.added
        if "correction" in added and not (self.training and self.phase == "shared"):
            weight = weight + added["correction"]
        if "label_prior" in added and bias is not None:
            bias = bias + added["label_prior"]
        return functional.linear(input, weight, bias)

    def private_parameters(self) -> list[nn.Parameter]:
        """Private factors, and the private parts."""
        return [*super().private_parameters(), *self.added.values()]

    def _dense_parameters(self) -> dict[str, nn.Parameter | None]:
        parameters = super()._dense_parameters()
        for name, private in self.added.items():
            del parameters[name]
            base = parameters[ADDED[name]]
            assert base is not None
            folded = (base + private).detach()
            parameters[ADDED[name]] = nn.Parameter(folded, requires_grad=base.requires_grad)
        return parameters

    def reset_parameters(self) -> None:
        """Draw the weight anew, factors or not, and set H to zero; label counts are kept."""
        super().reset_parameters()
        if "correction" in self.added:
            with torch.no_grad():
                self.added["correction"].zero_()

    def extra_repr(self) -> str:
        """The text of the factorised layer, then which private parts there are."""
        return ", ".join([super().extra_repr(), *self.added])
