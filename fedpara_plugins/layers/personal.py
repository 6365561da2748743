"""The classification layer with private parameters: y = x (W + H)ᵀ + b + p.

H corrects the weight for this client. It starts at zero and is trained in private steps only. p
holds the logarithms of the client's label frequencies (`fedpara_plugins.set_label_counts`) and is
never trained. In the dense model both are folded into weight and bias.

This layer is registered for no class. `fedpara_plugins.convert` uses it for the one layer that the
options ``private_head`` and ``label_prior`` are about.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers.base import FactorisedLayer
from fedpara_plugins.layers.linear import FactorisedLinear
from fedpara_plugins.support.torch_seams import own_parameters

__all__ = ["ADDED", "PersonalLinear"]

ADDED = {"correction": "weight", "label_prior": "bias"}
"""The private parameters, and the parameter of the dense layer that each is added to."""


class PersonalLinear(FactorisedLinear):
    """A linear layer, factorised or dense, with a private correction, a label prior, or both.

    ``weight`` and ``bias`` are the shared part alone. The forward adds the private parameters.
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
        """Return the layer in place of ``dense``; its private parameters start at zero.

        Args:
            dense: see `FactorisedLayer.from_dense`.
            plans: see there; empty if the weight stays dense.
            name: see there.
            seed: see there.
            fit: see there.
            correction: add H, shape (out_features, in_features), trained if the weight is.
            label_prior: add p, shape (out_features,); ``dense`` must have a bias.
        """
        layer = super().from_dense(dense, plans, name=name, seed=seed, fit=fit)
        for added, wanted in (("correction", correction), ("label_prior", label_prior)):
            if wanted:
                target = dense.get_parameter(ADDED[added])
                trained = added == "correction" and target.requires_grad
                zero = torch.zeros_like(target, requires_grad=False)
                own_parameters(layer)[added] = nn.Parameter(zero, requires_grad=trained)
        return layer

    @property
    def added(self) -> dict[str, nn.Parameter]:
        """The private parameters of this layer, by their names in `ADDED`."""
        found = {name: self._parameters.get(name) for name in ADDED}
        return {name: value for name, value in found.items() if value is not None}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """Return the logits, shape (..., out_features); shared training steps leave H out."""
        weight = self.composed_weight("weight")
        bias: Tensor | None = self.bias
        added = self.added
        if "correction" in added and not (self.training and self.phase == "shared"):
            weight = weight + added["correction"]
        if "label_prior" in added and bias is not None:
            bias = bias + added["label_prior"]
        return functional.linear(input, weight, bias)

    def private_parameters(self) -> list[nn.Parameter]:
        """Return the private factors and the private parameters."""
        return [*super().private_parameters(), *self.added.values()]

    def _dense_parameters(self) -> dict[str, nn.Parameter | None]:
        parameters = super()._dense_parameters()
        for name, private in self.added.items():
            del parameters[name]
            target = parameters[ADDED[name]]
            assert target is not None
            folded = (target + private).detach()
            parameters[ADDED[name]] = nn.Parameter(folded, requires_grad=target.requires_grad)
        return parameters

    def reset_parameters(self) -> None:
        """Draw the weight anew, factorised or dense, and set H to zero; p stays."""
        super().reset_parameters()
        if "correction" in self.added:
            with torch.no_grad():
                self.added["correction"].zero_()

    def extra_repr(self) -> str:
        """Return the factorised layer's text, then the names of the private parameters."""
        return ", ".join([super().extra_repr(), *self.added])
