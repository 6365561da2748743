"""The model, which knows the digits 0 to 4, and the clients' images of 5 to 9."""

from __future__ import annotations

from functools import cache

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_OLD = 5
NUM_TEST = 200


class Net(lightning.LightningModule):
    """A small network for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
        )
        self.head = nn.Linear(256, NUM_OLD)
        self.learning_rate = 1e-3

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0)


def pretrained() -> Net:
    """Build the model with its trained weights. Yours may come from a file."""
    model = Net()
    model.load_state_dict(_trained_state())
    return model


@cache
def _trained_state() -> dict[str, Tensor]:
    images, labels = load_images(old=True)
    with torch.random.fork_rng():  # the same weights on every side
        torch.manual_seed(0)
        model = Net()
        optimizer = model.configure_optimizers()
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.state_dict()


@cache
def load_images(*, old: bool) -> tuple[Tensor, Tensor]:
    """Load the images of 0 to 4 or of 5 to 9, with labels from 0 to 4."""
    digits = load_digits()
    labels = torch.as_tensor(digits.target)
    images = torch.as_tensor(digits.images / 16, dtype=torch.float32)
    chosen = (labels < NUM_OLD) == old
    return images[chosen], labels[chosen] % NUM_OLD


def load_data(partition_id: int, num_partitions: int, batch_size: int) -> DataLoader:  # type: ignore[type-arg]
    """Load one client's images."""
    images, labels = load_images(old=False)
    own = slice(NUM_TEST + partition_id, None, num_partitions)
    shuffle = torch.Generator().manual_seed(partition_id)
    data = TensorDataset(images[own], labels[own])
    return DataLoader(data, batch_size=batch_size, shuffle=True, generator=shuffle)


@torch.no_grad()
def test(model: nn.Module) -> float:
    """Return the accuracy on images that no client has."""
    images, labels = load_images(old=False)
    model.eval()
    right = model(images[:NUM_TEST]).argmax(1) == labels[:NUM_TEST]
    return float(right.float().mean())


def trainer(epochs: int) -> lightning.Trainer:
    """Return Lightning's trainer, which leaves nothing on the disk."""
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
