"""Mime's steps as a ClientTrainer of FedML."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.optimizers import State, trained_parameters
from fedpara_plugins_fedml.rules.mime_statistics import BaseAlgorithm
from fedpara_plugins_fedml.rules.own_trainer import OwnTrainer

__all__ = ["MimeTrainer"]


class MimeTrainer(OwnTrainer):
    """Trains with y <- y - lr U(g, s), see `mime`; private factors make plain SGD steps.

    Args:
        model: the client's.
        args: FedML's.
        base: the base algorithm.
        lite: whether the optimizer is MimeLite, where g is the gradient at y.
    """

    def __init__(self, model: nn.Module, args: Any, base: BaseAlgorithm, *, lite: bool) -> None:
        super().__init__(model, args)
        self._base, self._lite = base, lite
        self._statistics: Mapping[str, State] = {}
        self._correction: State = {}
        self._at_x: nn.Module | None = None
        self._s: dict[str, dict[str, Tensor]] = {}
        self._c: State = {}

    def set_round(self, statistics: Mapping[str, State], correction: State) -> None:
        """Set the tensors that the server sent for this round."""
        self._statistics = {k: statistics[k] for k in self._base.names if k in statistics}
        self._correction = correction

    def losses(self, train_data: Any, device: Any) -> Iterator[tuple[Tensor, int]]:
        """Make one pass over the data: yield each batch's mean loss and number of examples."""
        for inputs, labels in train_data:
            yield self.loss(self.model, inputs, labels, device), len(labels)

    def begin(self, device: Any, args: Any) -> None:
        """Copy the model at x, and move the server's tensors to the device."""
        self._at_x = None if self._lite else copy.deepcopy(self.model)
        self._c = {name: value.to(device) for name, value in self._correction.items()}
        self._s = {
            name: {kind: part[name].to(device) for kind, part in self._statistics.items()}
            for name in trained_parameters(self.model)
        }

    def step(self, inputs: Any, labels: Any, device: Any, rate: float) -> float:
        """Make one step on one batch, and return its loss."""
        weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        random_state = torch.get_rng_state()
        loss = self.loss(self.model, inputs, labels, device)
        gradients = _gradients(loss, weights)
        if self._at_x is not None:
            torch.set_rng_state(random_state)  # the same dropout at x as at y
            at_x = self.loss(self._at_x, inputs, labels, device)
            first = _gradients(at_x, dict(self._at_x.named_parameters()))
            for name in self._s:
                gradients[name] = gradients[name] - first[name] + self._c[name]
        with torch.no_grad():
            for name, weight in weights.items():
                g = gradients[name]
                weight.sub_(
                    rate * (self._base.direction(g, self._s[name]) if name in self._s else g)
                )
        return float(loss.detach())


def _gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> State:
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(trained.items(), found, strict=True)
    }
