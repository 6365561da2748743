"""Mime's steps as an ordinary ClientTrainer of FedML."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from fedml.core.alg_frame.client_trainer import ClientTrainer
from fedml.ml.trainer.trainer_creator import create_model_trainer
from torch import Tensor, nn

from fedpara_plugins.optimizers import State, trained_parameters
from fedpara_plugins_fedml.rules.mime_statistics import Base

__all__ = ["MimeTrainer"]

log = logging.getLogger("fedpara.fedml")


class MimeTrainer(ClientTrainer):  # type: ignore[misc]
    """y <- y - lr U(g, s), see `mime`; private factors make plain SGD steps.

    Loss and test are those of FedML's default trainer for the data set.

    Args:
        model: the client's.
        args: FedML's: ``learning_rate``, ``epochs``, ``dataset``.
        base: algorithm.
        lite: MimeLite: g is the gradient at y.
    """

    def __init__(self, model: nn.Module, args: Any, base: Base, *, lite: bool) -> None:
        super().__init__(model, args)
        self._default = create_model_trainer(model, args)
        self._base, self._lite = base, lite
        self._statistics: Mapping[str, State] = {}
        self._correction: State = {}

    def set_round(self, statistics: Mapping[str, State], correction: State) -> None:
        """What the server sent for this round."""
        self._statistics = {k: statistics[k] for k in self._base.names if k in statistics}
        self._correction = correction

    def get_model_params(self) -> Any:
        """The model's state, on the CPU."""
        return self.model.cpu().state_dict()

    def set_model_params(self, model_parameters: Any) -> None:
        """Load a state."""
        self.model.load_state_dict(model_parameters)

    def test(self, test_data: Any, device: Any, args: Any) -> Any:
        """As FedML's default trainer."""
        self._default.model = self.model
        return self._default.test(test_data, device, args)

    def losses(self, train_data: Any, device: Any) -> Iterator[tuple[Tensor, int]]:
        """One pass over the data: each batch's mean loss and its number of examples."""
        for inputs, labels in train_data:
            yield self._loss(self.model, inputs, labels, device), len(labels)

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        """All epochs of a round."""
        self.model.to(device)
        self.model.train()
        shared = trained_parameters(self.model)
        weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        at_x = None if self._lite else copy.deepcopy(self.model)
        s = {
            name: {kind: part[name].to(device) for kind, part in self._statistics.items()}
            for name in shared
        }
        c = {name: value.to(device) for name, value in self._correction.items()}
        for epoch in range(args.epochs):
            losses = []
            for inputs, labels in train_data:
                chance = torch.get_rng_state()
                loss = self._loss(self.model, inputs, labels, device)
                gradients = _gradients(loss, weights)
                losses.append(float(loss.detach()))
                if at_x is not None:
                    torch.set_rng_state(chance)  # the same dropout at x as at y
                    first = _gradients(
                        self._loss(at_x, inputs, labels, device), dict(at_x.named_parameters())
                    )
                    for name in shared:
                        gradients[name] = gradients[name] - first[name] + c[name]
                self._move(weights, shared, gradients, s, args.learning_rate)
            mean = sum(losses) / len(losses) if losses else 0.0
            log.debug("client %s, epoch %d: loss %.6f", self.id, epoch, mean)

    @torch.no_grad()
    def _move(
        self,
        weights: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        gradients: State,
        s: Mapping[str, Mapping[str, Tensor]],
        rate: float,
    ) -> None:
        for name, weight in weights.items():
            g = gradients[name]
            weight.sub_(rate * (self._base.act(g, s[name]) if name in shared else g))

    def _loss(self, model: nn.Module, inputs: Any, labels: Any, device: Any) -> Tensor:
        outputs, labels = model(inputs.to(device)), labels.to(device)
        dataset = self.args.dataset
        if dataset == "stackoverflow_lr":
            loss = nn.functional.binary_cross_entropy(outputs, labels, reduction="sum")
        elif dataset in ("fed_shakespeare", "stackoverflow_nwp"):
            loss = nn.functional.cross_entropy(outputs, labels.long(), ignore_index=0)
        else:
            loss = nn.functional.cross_entropy(outputs, labels.long())
        return loss


def _gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> State:
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if part is None else part
        for (name, weight), part in zip(weights.items(), found, strict=True)
    }
