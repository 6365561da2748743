"""Factorised `nn.LSTM` and `nn.GRU`: each matrix of each layer and direction by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpara_plugins.factors.fast.conditions import autocasts
from fedpara_plugins.factors.plan import WeightPlan, WeightSlot
from fedpara_plugins.layers.base import FactorisedLayer, layers_alive
from fedpara_plugins.layers.read_only import read_only
from fedpara_plugins.support.torch_seams import FX_LEAF, own_parameters

__all__ = ["FactorisedGRU", "FactorisedLSTM", "FactorisedRecurrent"]


class FactorisedRecurrent(FactorisedLayer, nn.RNNBase):
    """The base of recurrent kinds: a matrix is composed once per forward, not per time step.

    Weights are named as in torch (``weight_ih_l0``, ``weight_hh_l0_reverse``, ``weight_hr_l0``),
    their factors ``weight_ih_l0_x1`` and so on. Weights too small to save stay parameters.

    The dense layer keeps a list of its weights, ``_flat_weights``, beside the parameters (see
    `torch_seams.OVERRIDDEN_NAMES`). Here the list is composed whenever it is read. No tensor of a
    graph stays in the layer, so it can be copied and pickled after any training step.
    """

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """Return all matrices: (gates * hidden, input or hidden) and (proj, hidden)."""
        assert isinstance(dense, nn.RNNBase)
        # All weights start as uniform(-1/sqrt(hidden), 1/sqrt(hidden)), which has this variance.
        variance = 1 / (3 * dense.hidden_size)
        return [
            WeightSlot(name, tuple(parameter.shape), parameter.shape[1], variance)
            for name, parameter in own_parameters(dense).items()
            if parameter is not None and parameter.dim() == 2
        ]

    @classmethod
    def from_dense(
        cls, dense: nn.Module, plans: Mapping[str, WeightPlan], **options: Any
    ) -> FactorisedLayer:
        """Return the layer without the list that would keep the dense weights alive."""
        layer = super().from_dense(dense, plans, **options)
        del layer.__dict__["_flat_weights"]
        layer.__dict__["_flat_weight_refs"] = []
        return layer

    def to_dense(self) -> nn.Module:
        """Return the dense layer with its list of weights filled again."""
        dense = cast(nn.RNNBase, super().to_dense())
        dense._init_flat_weights()
        return dense

    def reset_parameters(self) -> None:
        """Draw dense weights and biases anew as the dense layer does, then the factors."""
        nn.RNNBase.reset_parameters(self)
        super().reset_parameters()

    def __getattr__(self, name: str) -> Any:
        # The names differ between instances, so the class cannot declare them with `composed`.
        if name in self.__dict__.get("plans", ()):
            return read_only(self.composed_weight(name), name)
        return super().__getattr__(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # nn.RNNBase would compose every weight here, only to keep weak references to them.
        nn.Module.__setstate__(self, {**state, **FX_LEAF})  # type: ignore[no-untyped-call]
        layers_alive.add(self)
        self._flat_weight_refs = []

    # Methods with which the dense layer maintains its list of weights

    @property
    def _flat_weights(self) -> list[Any]:
        # Biases come from the dictionary, since `getattr` of a module takes long.
        found = {**self._parameters, **self.composed_weights()}
        names = self._flat_weights_names
        return [found[name] if name in found else getattr(self, name) for name in names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        pass

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: composed weights are new at each forward, with nothing to lay out."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:  # noqa: A002
        """Check the input; the dense layer would compose every weight to learn the dtype.

        Args:
            input: (length, batch, input_size) or batch first; (total, input_size) if packed.
            batch_sizes: those of a packed sequence, else None.

        Raises:
            ValueError: the input's dtype is not that of the weights.
            RuntimeError: the input's shape is wrong.
        """
        dtype = self._weight_dtype()
        if input.dtype != dtype and not autocasts(input.device.type):
            raise ValueError(
                f"{self.dense_class.__name__}: expected an input of {dtype}, as the weights are, "
                f"got {input.dtype}. Convert the input with .to({dtype}) or the model with "
                f".to({input.dtype})"
            )
        dimensions = 3 if batch_sizes is None else 2
        if input.dim() != dimensions or input.size(-1) != self.input_size:
            raise RuntimeError(
                f"{self.dense_class.__name__}: expected an input of {dimensions} dimensions, the "
                f"last of size {self.input_size} (input_size), got shape {tuple(input.shape)}"
            )

    def _weight_dtype(self) -> torch.dtype:
        weight = next(iter(self.plans))
        base = self.base(weight)
        return (self.factors(weight)["x1"] if base is None else base).dtype


class FactorisedLSTM(FactorisedRecurrent, nn.LSTM):
    """`nn.LSTM` with composed matrices (Proposition 1)."""

    kind = "lstm"
    dense_class = nn.LSTM


class FactorisedGRU(FactorisedRecurrent, nn.GRU):
    """`nn.GRU` with composed matrices (Proposition 1)."""

    kind = "gru"
    dense_class = nn.GRU
