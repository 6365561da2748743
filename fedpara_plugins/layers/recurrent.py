"""`nn.LSTM` and `nn.GRU` from factors: every matrix of every layer and direction on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedpara_plugins.factors.plan import WeightPlan, WeightSlot
from fedpara_plugins.layers.base import FactorisedLayer, layers_alive

__all__ = ["FactorisedGRU", "FactorisedLSTM", "FactorisedRecurrent"]


class FactorisedRecurrent(FactorisedLayer, nn.RNNBase):
    """What recurrent layers share: each matrix is composed once per forward, not per time step.

    Weights are named as in torch (``weight_ih_l0``, ``weight_hh_l0_reverse``, ``weight_hr_l0``),
    their factors ``weight_ih_l0_x1`` and so on. Those too small to save stay parameters.

    The dense layer keeps a list of its weights, ``_flat_weights``, beside the parameters. Here it
    is composed when it is read: nothing that belongs to a graph stays in the layer, which can
    therefore be copied and pickled after any training step.
    """

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """All matrices: (gates * hidden, input), (gates * hidden, hidden), (proj, hidden)."""
        assert isinstance(dense, nn.RNNBase)
        # uniform(-1/sqrt(hidden), 1/sqrt(hidden)), the default of all, has this variance.
        variance = 1 / (3 * dense.hidden_size)
        return [
            WeightSlot(name, tuple(parameter.shape), parameter.shape[1], variance)
            for name, parameter in dense._parameters.items()
            if parameter is not None and parameter.dim() == 2
        ]

    @classmethod
    def from_dense(
        cls, dense: nn.Module, plans: Mapping[str, WeightPlan], **options: Any
    ) -> FactorisedLayer:
        """As for every kind, without the list that would keep the dense weights alive."""
        layer = super().from_dense(dense, plans, **options)
        del layer.__dict__["_flat_weights"]
        layer.__dict__["_flat_weight_refs"] = []
        return layer

    def to_dense(self) -> nn.Module:
        """The ordinary layer, its list of weights filled again."""
        dense = cast(nn.RNNBase, super().to_dense())
        dense._init_flat_weights()
        return dense

    def reset_parameters(self) -> None:
        """Draw everything anew: dense weights and biases as the dense layer does, then factors."""
        nn.RNNBase.reset_parameters(self)
        super().reset_parameters()

    def __getattr__(self, name: str) -> Any:
        # Names differ from instance to instance, so no `composed` can be declared for them.
        if name in self.__dict__.get("plans", ()):
            return self.composed_weight(name)
        return super().__getattr__(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # nn.RNNBase would compose every weight here, only to remember where it was.
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]
        layers_alive.add(self)
        self._flat_weight_refs = []

    # The dense layer's bookkeeping of a list that is not kept here

    @property
    def _flat_weights(self) -> list[Any]:
        # Biases as what they are: to look for attributes of modules takes long.
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
        """Nothing to lay out in one chunk: composed weights are new at every forward."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:  # noqa: A002
        """The dense layer's checks, which would compose every weight to learn the dtype of one.

        Args:
            input: (length, batch, input_size) or batch first; (total, input_size) if packed.
            batch_sizes: of a packed sequence, else None.

        Raises:
            ValueError: the input has another dtype than the weights.
            RuntimeError: it has another shape.
        """
        dtype = next(iter(self.factors(next(iter(self.plans))).values())).dtype
        if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
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


class FactorisedLSTM(FactorisedRecurrent, nn.LSTM):
    """An LSTM whose matrices are composed at every forward (Proposition 1)."""

    kind = "lstm"
    dense_class = nn.LSTM


class FactorisedGRU(FactorisedRecurrent, nn.GRU):
    """A GRU whose matrices are composed at every forward (Proposition 1)."""

    kind = "gru"
    dense_class = nn.GRU
