"""A model inside of Lightning's and of Hugging Face's training loops, with batches in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness.oracles.plain_steps import loss_of

__all__ = ["InOrder", "LightningNet", "TransformersNet", "lightning_fit"]


class LightningNet(lightning.LightningModule):
    """A model for Lightning.

    Args:
        model: to be trained.
        make: returns what ``configure_optimizers`` does, given the model.
    """

    def __init__(self, model: nn.Module, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model, self.make = model, make

    def training_step(self, batch: Tensor, index: int) -> Any:
        """Return the loss of a batch."""
        return loss_of(self.model(batch))

    def configure_optimizers(self) -> Any:
        """Return the optimizers."""
        return self.make(self.model)


def lightning_fit(
    net: LightningNet, inputs: Sequence[Tensor], folder: Path, **options: Any
) -> None:
    """Train for one pass over the inputs, in their order.

    Args:
        net: the model.
        inputs: a batch each.
        folder: where Lightning may write.
        options: further ones of Lightning's Trainer.
    """
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    ).fit(net, DataLoader(list(inputs), batch_size=None))  # type: ignore[arg-type]


class TransformersNet(nn.Module):
    """A model for Hugging Face's Trainer, which reads the loss from what it returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the loss of a batch."""
        return {"loss": loss_of(self.model(x))}


class InOrder(transformers.Trainer):
    """A Trainer that takes the batches as they come."""

    def get_train_dataloader(self) -> Any:
        """Return the batches."""
        return DataLoader(self.train_dataset, batch_size=None)
