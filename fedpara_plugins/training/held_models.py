"""Which converted models an optimizer trains."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from operator import is_

from torch import Tensor
from torch.optim import Optimizer

from fedpara_plugins.layers.base import FactorisedLayer, layers_alive
from fedpara_plugins.support.torch_seams import own_parameters
from fedpara_plugins.training.progress import RoundProgress
from fedpara_plugins.training.real_steps import parameters_of

__all__ = ["HeldModel", "held_models"]


@dataclass(frozen=True)
class HeldModel:
    """A converted model of which an optimizer holds parameters.

    Attributes:
        progress: the model's progress.
        own: the parameters of the optimizer, without those of other converted models.
        is_whole: whether they are all of the model's parameters.
    """

    progress: RoundProgress
    own: tuple[Tensor, ...]
    is_whole: bool
    _layers: tuple[weakref.ref[FactorisedLayer], ...]

    @property
    def layers(self) -> list[FactorisedLayer]:
        """The model's factorised layers."""
        return [layer for ref in self._layers if (layer := ref()) is not None]

    def others(self) -> list[Tensor]:
        """Return the model's parameters that this optimizer does not hold."""
        own = {id(parameter) for parameter in self.own}
        return [p for p in _parameters(self.progress, self.layers) if id(p) not in own]


_Found = tuple[list[Tensor], list[HeldModel]]
_found: weakref.WeakKeyDictionary[Optimizer, _Found] = weakref.WeakKeyDictionary()
"""For each optimizer the parameters that it had when it was searched, and what was found."""


def held_models(optimizer: Optimizer) -> list[HeldModel]:
    """Return the converted models that an optimizer trains a part of, factors or dense layers.

    Parameter groups may be replaced and refilled at any time.
    """
    parameters = parameters_of(optimizer)
    found = _found.get(optimizer)
    if found is None or not _are_same(found[0], parameters):
        found = _found[optimizer] = parameters, _search(parameters)
    return found[1]


def _are_same(before: list[Tensor], now: list[Tensor]) -> bool:
    return len(before) == len(now) and all(map(is_, before, now))


def _search(parameters: list[Tensor]) -> list[HeldModel]:
    held = {id(parameter) for parameter in parameters}
    models: dict[RoundProgress, list[FactorisedLayer]] = {}
    for layer in list(layers_alive):
        if isinstance(layer.progress, RoundProgress):
            models.setdefault(layer.progress, []).append(layer)
    members = {
        progress: {id(p): p for p in _parameters(progress, layers)}
        for progress, layers in models.items()
    }
    mine = {progress: ids for progress, ids in members.items() if not held.isdisjoint(ids)}
    return [
        HeldModel(
            progress,
            tuple(p for p in parameters if id(p) in ids or not _in_another(id(p), ids, mine)),
            held.issuperset(ids),
            tuple(weakref.ref(layer) for layer in models[progress]),
        )
        for progress, ids in mine.items()
    ]


def _in_another(
    key: int, ids: dict[int, Tensor], models: dict[RoundProgress, dict[int, Tensor]]
) -> bool:
    return any(key in other for other in models.values() if other is not ids)


def _parameters(progress: RoundProgress, layers: list[FactorisedLayer]) -> Iterator[Tensor]:
    for layer in layers:
        yield from (p for p in own_parameters(layer).values() if p is not None)
    yield from progress.dense or ()
