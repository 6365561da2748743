"""VGG16 and ResNet18, an eighth to a quarter as wide as the originals."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedpara_plugins as fedpara
from fedpara_plugins.layers import FactorisedConv2d, FactorisedLayer, FactorisedLinear

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8)


def norm(kind, channels):
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(8, channels)


def vgg16(kind):
    """Configuration D of the original, with a norm after every convolution."""
    layers, channels = [], 3
    for width, count in [(16, 2), (32, 2), (64, 3), (128, 3), (128, 3)]:
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), norm(kind, width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.Flatten(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU()]
    return nn.Sequential(*layers, *head, nn.Linear(96, 10))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(Block(n, m, 1 if n == m else 2), Block(m, m, 1))
                for n, m in pairwise(widths)
            )
        )
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def output(model):
    return model(IMAGES)


def loss(model):
    return F.cross_entropy(output(model), LABELS)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def count(model, kind):
    return sum(isinstance(m, FactorisedLayer) and isinstance(m, kind) for m in model.modules())


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_vgg16(journey, kind):
    model = journey(lambda: vgg16(kind), output, loss, optimizer=sgd, steps=28, fall=0.85)
    assert type(model[0]) is nn.Conv2d
    assert (count(model, FactorisedConv2d), count(model, FactorisedLinear)) == (12, 2)
    report = fedpara.report(model)
    assert report.shared_bytes < 0.45 * report.dense_bytes


def test_resnet18(journey):
    model = journey(ResNet18, output, loss, optimizer=sgd)
    assert type(model.conv1) is nn.Conv2d
    # 16 3x3 kernels; of the three 1x1 ones of the shortcuts the 32x16 one is below min_size.
    assert count(model, FactorisedConv2d) == 18
    notes = {row.name: row.note for row in fedpara.report(model).rows}
    assert "min_size" in notes["layers.1.0.downsample.0"]
