"""The project's model."""

from __future__ import annotations

from torch import Tensor, nn


class Net(nn.Module):
    """Two convolutions and two linear layers for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(512, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [n, 10] of images [n, 1, 8, 8]."""
        logits: Tensor = self.head(nn.functional.relu(self.hidden(self.features(images))))
        return logits
