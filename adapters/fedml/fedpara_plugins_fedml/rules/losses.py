"""The loss of a client's trainer, for what needs a pass over its data outside the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS
from fedml.ml.trainer.my_model_trainer_nwp import ModelTrainerNWP
from fedml.ml.trainer.my_model_trainer_tag_prediction import ModelTrainerTAGPred
from torch import Tensor, nn

from fedpara_plugins import ConfigError

__all__ = ["Losses", "default_loss", "losses_of"]

Losses = Callable[[], Iterable[tuple[Tensor, int]]]
"""Makes one pass over a client's data: each batch's mean loss and how many examples it has."""

DEFAULTS = (ModelTrainerCLS, ModelTrainerNWP, ModelTrainerTAGPred)


def default_loss(
    dataset: str, model: nn.Module, inputs: Any, labels: Any, device: torch.device
) -> Tensor:
    """Of one batch, as FedML's default trainer for that data set computes it."""
    outputs, labels = model(inputs.to(device)), labels.to(device)
    if dataset == "stackoverflow_lr":
        return nn.functional.binary_cross_entropy(outputs, labels, reduction="sum")
    if dataset in ("fed_shakespeare", "stackoverflow_nwp"):
        return nn.functional.cross_entropy(outputs, labels.long(), ignore_index=0)
    return nn.functional.cross_entropy(outputs, labels.long())


def losses_of(trainer: Any, train_data: Any, device: torch.device, args: Any) -> Losses:
    """A pass over a client's data: the trainer's own ``losses``, or what FedML's default minimises.

    Args:
        trainer: the user's or FedML's; its model is on the device.
        train_data: the client's.
        device: to compute on.
        args: FedML's.

    Raises:
        ConfigError: a trainer of the user's own, whose loss nobody here knows.
    """
    own = getattr(trainer, "losses", None)
    if callable(own):
        return lambda: own(train_data, device, args)
    if type(trainer).train not in [default.train for default in DEFAULTS]:
        raise ConfigError(
            f"SCAFFOLD's option I needs the gradient at the server's model over a client's data, "
            f"and the loss of {type(trainer).__name__} is its own: give it a method "
            f"losses(self, train_data, device, args) that yields (mean loss of a batch, number of "
            f"its examples) for self.model, or set fedpara_scaffold_option: II"
        )
    model = trainer.model
    return lambda: (
        (default_loss(args.dataset, model, inputs, labels, device), len(labels))
        for inputs, labels in train_data
    )
