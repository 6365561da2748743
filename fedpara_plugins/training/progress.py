"""The progress of a converted model in its round, which all its layers share."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.layers.base import FactorisedLayer, Phase
from fedpara_plugins.support.torch_seams import TensorWeakRef, own_parameters

__all__ = ["DenseParameters", "RoundProgress", "layers_of", "set_phase"]


class DenseParameters:
    """The parameters of a model that belong to none of its factorised layers.

    Parameters that the model gets later, by ``load_state_dict(..., assign=True)`` or with another
    head, belong to them. All is held weakly: of a part that outlives its model, the parameters are
    those that the model had, as in a pickled model until its next round. A copy of the model gets
    those of the copy.
    """

    def __init__(self, parameters: Iterable[Tensor] = (), model: nn.Module | None = None) -> None:
        self._references = [TensorWeakRef(parameter) for parameter in parameters]
        self._model = None if model is None else weakref.ref(model)

    @classmethod
    def of(cls, model: nn.Module) -> DenseParameters:
        """Return those of a model."""
        return cls(_outside_of_layers(model), model)

    def __iter__(self) -> Iterator[Tensor]:
        model = None if self._model is None else self._model()
        if model is not None:
            yield from _outside_of_layers(model)
            return
        for reference in self._references:
            parameter = reference()
            if parameter is not None:
                yield parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseParameters:
        model = None if self._model is None else self._model()
        # A model is in the memo before its parts are.
        return type(self)(copy.deepcopy(list(self), memo), memo.get(id(model)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self),)


def _outside_of_layers(model: nn.Module) -> Iterator[Tensor]:
    inside: dict[int, Tensor] = {}
    outside: dict[int, Tensor] = {}
    for module in model.modules():
        found = inside if isinstance(module, FactorisedLayer) else outside
        found.update({id(p): p for p in own_parameters(module).values() if p is not None})
    return (p for key, p in outside.items() if key not in inside)


@dataclass(eq=False)
class RoundProgress:
    """The progress of a model in its round: one object for all layers, another for each copy.

    Attributes:
        config: the options that the model was converted with.
        decoupled: whether private and shared steps are separate.
        private_steps: number of private steps at the start of this round.
        steps: number of steps made in this round so far. Steps of several optimizers from the same
            backward pass are one.
        counts_given: whether `fedpara_plugins.set_label_counts` was called on the model.
        dense: the model's parameters outside of its factorised layers.
        rounds: number of rounds started so far.
        diverged: whether a gradient of this round was not finite.
    """

    config: FedParaConfig
    decoupled: bool
    private_steps: int
    steps: int = 0
    counts_given: bool = False
    dense: DenseParameters | None = None
    rounds: int = 0
    diverged: bool = False

    @property
    def phase(self) -> Phase:
        """Which factors the next step moves."""
        if not self.decoupled:
            return "joint"
        return "private" if self.steps < self.private_steps else "shared"


def layers_of(model: nn.Module) -> list[FactorisedLayer]:
    """Return the factorised layers of a model."""
    return [layer for layer in model.modules() if isinstance(layer, FactorisedLayer)]


def set_phase(layers: Iterable[FactorisedLayer], phase: Phase) -> None:
    """Let the next forward of the layers be of that phase."""
    for layer in layers:
        layer.__dict__["phase"] = phase
