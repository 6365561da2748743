"""A ClientTrainer of FedML for optimizers that make steps of their own."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any

from fedml.core.alg_frame.client_trainer import ClientTrainer
from fedml.ml.trainer.trainer_creator import create_model_trainer
from torch import Tensor, nn

from fedpara_plugins_fedml.rules.losses import default_loss

__all__ = ["OwnTrainer"]

log = logging.getLogger("fedpara.fedml")


class OwnTrainer(ClientTrainer):  # type: ignore[misc]
    """Loss and test are those of FedML's default trainer for the data set.

    Args:
        model: the client's.
        args: FedML's: ``learning_rate``, ``epochs``, ``dataset``.
    """

    def __init__(self, model: nn.Module, args: Any) -> None:
        super().__init__(model, args)
        self._default = create_model_trainer(model, args)

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

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        """All epochs of a round."""
        self.model.to(device)
        self.model.train()
        self.begin(device, args)
        for epoch in range(args.epochs):
            losses = [
                self.step(inputs, labels, device, args.learning_rate)
                for inputs, labels in train_data
            ]
            mean = sum(losses) / len(losses) if losses else 0.0
            log.info("Client Index = %s\tEpoch: %d\tLoss: %.6f", self.id, epoch, mean)

    @abstractmethod
    def begin(self, device: Any, args: Any) -> None:
        """A round begins."""

    @abstractmethod
    def step(self, inputs: Any, labels: Any, device: Any, rate: float) -> float:
        """One step on one batch; its loss."""

    def loss(self, model: nn.Module, inputs: Any, labels: Any, device: Any) -> Tensor:
        """Of one batch, as FedML's default trainer computes it."""
        return default_loss(self.args.dataset, model, inputs, labels, device)
