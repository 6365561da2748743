"""The models of the tasks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["mlp", "small_cnn", "small_vgg"]


def mlp() -> nn.Module:
    """Build three linear layers for 14x14 images (34,122 values)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(196, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


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
    """Build six convolutions with GroupNorm and two linear layers (139,418 values).

    The input is 32x32 and in colour. The first convolution has a stride of 2, for the sake of time.
    """

    def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for i, step in ((inputs, stride), (outputs, 1)):
            convolution = nn.Conv2d(i, outputs, 3, padding=1, stride=step)
            layers += [convolution, nn.GroupNorm(8, outputs), nn.ReLU()]
        return layers

    def pool() -> nn.Module:
        return nn.MaxPool2d(2)

    body = [*block(3, 16, stride=2), pool(), *block(16, 32), pool(), *block(32, 64)]
    parts = OrderedDict[str, nn.Module](
        body=nn.Sequential(*body, nn.Flatten()),
        hidden=nn.Linear(64 * 16, 64),
        relu=nn.ReLU(),
        head=nn.Linear(64, 10),
    )
    return nn.Sequential(parts)
