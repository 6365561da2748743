"""The progress of a converted model in its round, which all its layers share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.layers.base import FactorisedLayer, Phase
from fedpara_plugins.support.torch_seams import TensorWeakRef

__all__ = ["DenseParameters", "RoundProgress", "layers_of", "set_phase"]


class DenseParameters:
    """The parameters of a model that belong to none of its factorised layers.

    They are held weakly. A copy of the model, and a pickled one, gets those of the copy.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self._references = [TensorWeakRef(parameter) for parameter in parameters]

    @classmethod
    def of(cls, model: nn.Module) -> DenseParameters:
        """Return those of a model."""
        own = {id(p) for layer in layers_of(model) for p in layer.parameters(recurse=False)}
        return cls(p for p in model.parameters() if id(p) not in own)

    def __iter__(self) -> Iterator[Tensor]:
        for reference in self._references:
            parameter = reference()
            if parameter is not None:
                yield parameter

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self),)


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
