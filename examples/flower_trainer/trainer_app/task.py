"""The vision transformer, and the clients' images."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

NUM_CLASSES = 10
NUM_TEST = 297


def get_model(name: str = "") -> Any:
    """Load the model, with a head for this task."""
    if name:
        return AutoModelForImageClassification.from_pretrained(
            name, num_labels=NUM_CLASSES, ignore_mismatched_sizes=True
        )
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=NUM_CLASSES,
    )
    with torch.random.fork_rng():  # the same weights on every side
        torch.manual_seed(0)
        return ViTForImageClassification(config)


@cache
def load_images() -> tuple[Tensor, Tensor]:
    """Load all images, [1797, 1, 8, 8] from -1 to 1, and their labels, in a random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(digits.images / 8 - 1, dtype=torch.float32).unsqueeze(1)
    return images[order], torch.as_tensor(digits.target)[order]


def load_data(partition_id: int, num_partitions: int) -> list[dict[str, Tensor]]:
    """Load one client's images."""
    images, labels = load_images()
    own = range(NUM_TEST + partition_id, len(labels), num_partitions)
    return [{"pixel_values": images[i], "labels": labels[i]} for i in own]


@torch.no_grad()
def test(model: Any) -> float:
    """Return the accuracy on images that no client has."""
    images, labels = load_images()
    model.eval()
    right = model(images[:NUM_TEST]).logits.argmax(1) == labels[:NUM_TEST]
    return float(right.float().mean())
