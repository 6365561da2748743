"""The models of the tasks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["digits_mlp", "mlp", "motion_cnn", "normed_cnn", "small_cnn", "small_vgg"]


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


def digits_mlp() -> nn.Module:
    """Build an MLP with one hidden layer of 256 for 28x28 images (203,530 values)."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def small_cnn(normed: bool = False) -> nn.Module:
    """Build three convolutions and two linear layers for 28x28 images (124,106 values).

    The first convolution has a stride of 2, for the sake of time.

    Args:
        normed: with GroupNorm behind each convolution.
    """

    def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        norm = [nn.GroupNorm(8, outputs)] if normed else []
        pool = nn.MaxPool2d(2, ceil_mode=True)
        return [nn.Conv2d(inputs, outputs, 3, stride, padding=1), *norm, nn.ReLU(), pool]

    layers = [*block(1, 32, stride=2), *block(32, 64), *block(64, 64)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * 4, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def normed_cnn() -> nn.Module:
    """Build `small_cnn` with GroupNorm."""
    return small_cnn(normed=True)


def motion_cnn() -> nn.Module:
    """Build two convolutions over time and two linear layers for 128 samples of 9 channels."""

    def block(inputs: int) -> list[nn.Module]:
        return [nn.Conv1d(inputs, 64, 9, padding=4), nn.ReLU(), nn.MaxPool1d(4)]

    return nn.Sequential(
        *block(9), *block(64), nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 6)
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
