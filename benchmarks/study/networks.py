"""The models of the tasks."""

from __future__ import annotations

from torch import nn

__all__ = ["small_cnn", "small_vgg"]


def small_cnn() -> nn.Module:
    """Build three convolutions and two linear layers for 28x28 images (320,714 values)."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        pool = nn.MaxPool2d(2, ceil_mode=True)
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), pool]

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
