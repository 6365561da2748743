"""A base of ClientTrainers for optimizers that make steps of their own."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from fedml.core import ClientTrainer
from torch import Tensor, nn

from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.rules.losses import default_loss
from fedpara_plugins_fedml.seams import create_model_trainer

__all__ = ["OwnTrainer"]


class OwnTrainer(ClientTrainer):  # type: ignore[misc]
    """A ClientTrainer with the loss and the test of FedML's default for the data set.

    Args:
        model: the client's.
        args: FedML's: ``learning_rate``, ``epochs``, ``dataset``.
    """

    def __init__(self, model: nn.Module, args: Any) -> None:
        super().__init__(model, args)
        self._default = create_model_trainer(model, args)

    def get_model_params(self) -> Any:
        """Return the model's state, on the CPU."""
        return self.model.cpu().state_dict()

    def set_model_params(self, model_parameters: Any) -> None:
        """Load a state."""
        self.model.load_state_dict(model_parameters)

    def test(self, test_data: Any, device: Any, args: Any) -> Any:
        """Test the model as FedML's default trainer does."""
        self._default.model = self.model
        return self._default.test(test_data, device, args)

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        """Train for all epochs of a round."""
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
        """Begin a round."""

    @abstractmethod
    def step(self, inputs: Any, labels: Any, device: Any, rate: float) -> float:
        """Make one step on one batch, and return its loss."""

    def loss(self, model: nn.Module, inputs: Any, labels: Any, device: Any) -> Tensor:
        """Return the loss of one batch, as FedML's default trainer computes it."""
        return default_loss(self.args.dataset, model, inputs, labels, device)
