"""What the description of a payload costs besides the tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.codecs import PRESETS, encode_payload, parse_codec


def vgg16():
    """Convolutions 64-64, 128-128, 3 of 256, 6 of 512, under the names that torchvision uses."""
    layers, width = [], 3
    for size in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        layers += [nn.Conv2d(width, size, 3, padding=1), nn.GroupNorm(32, size), nn.ReLU()]
        width = size
    head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 10))
    return nn.ModuleDict({"features": nn.Sequential(*layers), "classifier": head})


def sizes(net, preset):
    """Bytes of a payload's length, table and header, and of all of it."""
    reference = {name: value.detach() for name, value in fedpara.split(net).shared.items()}
    draw = torch.Generator().manual_seed(0)
    update = {
        name: value + 1e-3 * torch.randn(value.shape, generator=draw)
        for name, value in reference.items()
    }
    data = encode_payload(
        update,
        codec=parse_codec(preset),
        reference=reference,
        model=fedpara.ModelSpec.of(net).to_json(),
    )
    return 8 + int.from_bytes(data[:8], "little"), len(data)


def test_vgg16s_description_is_a_small_part_of_the_payload():
    torch.manual_seed(0)
    net = fedpara.convert(vgg16(), method="fedpara", gamma=0.1)
    described, whole = sizes(net, "balanced")
    assert described < 0.01 * min(whole, 1_200_000)
    described, _ = sizes(net, "small")
    assert described < 0.03 * 250_000


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_two_layer_model_is_described_in_3_kb(preset):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    assert sizes(fedpara.convert(net, method="pfedpara", gamma=0.5), preset)[0] < 3000
