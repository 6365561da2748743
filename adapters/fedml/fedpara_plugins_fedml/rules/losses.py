"""The loss of a client's trainer, for passes over its data outside the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins import ConfigError
from fedpara_plugins_fedml.seams import is_default_trainer

__all__ = ["Losses", "default_loss", "losses_of"]

Losses = Callable[[], Iterable[tuple[Tensor, int]]]
"""Makes one pass over a client's data, and yields each batch's mean loss and number of examples."""


def default_loss(
    dataset: str, model: nn.Module, inputs: Any, labels: Any, device: torch.device
) -> Tensor:
    """Return the loss of one batch, as FedML's default trainer for a data set computes it."""
    outputs, labels = model(inputs.to(device)), labels.to(device)
    if dataset == "stackoverflow_lr":
        return nn.functional.binary_cross_entropy(outputs, labels, reduction="sum")
    if dataset in ("fed_shakespeare", "stackoverflow_nwp"):
        return nn.functional.cross_entropy(outputs, labels.long(), ignore_index=0)
    return nn.functional.cross_entropy(outputs, labels.long())


def losses_of(trainer: Any, train_data: Any, device: torch.device, args: Any) -> Losses:
    """Return a pass over a client's data: the trainer's own ``losses``, or FedML's default loss.

    Args:
        trainer: the user's or FedML's; its model is on the device.
        train_data: the client's.
        device: to compute on.
        args: FedML's.

    Raises:
        ConfigError: if the trainer is the user's and has no ``losses``: its loss is not known.
    """
    own = getattr(trainer, "losses", None)
    if callable(own):
        return lambda: own(train_data, device, args)
    if not is_default_trainer(trainer):
        raise ConfigError(
            f"SCAFFOLD's option I needs the gradient at the server's model over a client's data, "
            f"and the loss of {type(trainer).__name__} is not known: give it a method "
            f"losses(self, train_data, device, args) that yields (mean loss of a batch, number of "
            f"its examples) for self.model, or set fedpara_scaffold_option: II"
        )
    model = trainer.model
    return lambda: (
        (default_loss(args.dataset, model, inputs, labels, device), len(labels))
        for inputs, labels in train_data
    )
