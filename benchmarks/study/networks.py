"""The models of the tasks."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["characters", "mlp", "signal_cnn", "small_cnn", "small_vgg"]


def small_cnn(*, norms: bool) -> nn.Module:
    """Build three convolutions and two linear layers for 28x28 images (320,714 values)."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        norm = [nn.GroupNorm(8, outputs)] if norms else []
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            *norm,
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
        ]

    layers = [*block(1, 32), *block(32, 64), *block(64, 64)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * 16, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def small_vgg() -> nn.Module:
    """Build six convolutions with GroupNorm and two linear layers for 32x32 colour images."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        layers = []
        for i in (inputs, outputs):
            layers += [nn.Conv2d(i, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]
        return [*layers, nn.MaxPool2d(2, ceil_mode=True)]

    layers = [*block(3, 32), *block(32, 64), *block(64, 128)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(128 * 16, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def mlp() -> nn.Module:
    """Build a perceptron with one hidden layer of 256 for 28x28 images (the paper's Figure 5)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def signal_cnn() -> nn.Module:
    """Build three 1-D convolutions and a linear layer for 9 channels of 128 samples."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((9, 64), (64, 128), (128, 128)):
        layers += [nn.Conv1d(inputs, outputs, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(512, 6))


class characters(nn.Module):  # noqa: N801  (built like the others)
    """A two-layer LSTM of 256 units over characters.

    Args:
        alphabet: number of characters.
    """

    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, 8)
        self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, alphabet)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (N, T, alphabet) for codes of shape (N, T)."""
        return self.head(self.lstm(self.embedding(x))[0])  # type: ignore[no-any-return]
