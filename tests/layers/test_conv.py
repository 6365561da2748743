import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.layers import FactorisedConv2d
from fedpara_plugins.testing.layer_contract import LayerContract


class TestConv1d(LayerContract):
    dense_class = nn.Conv1d

    def cases(self):
        series = torch.randn(2, 48, 19)
        return [
            (nn.Conv1d(48, 64, 5, padding="same", padding_mode="replicate"), series),
            (nn.Conv1d(48, 80, 3, stride=2, dilation=2, groups=2, bias=False), series),
            (nn.Conv1d(48, 128, 1), series),
        ]


class TestConv2d(LayerContract):
    dense_class = nn.Conv2d

    def cases(self):
        image = torch.randn(2, 48, 9, 8)
        return [
            (nn.Conv2d(48, 64, 3, padding=1), image),
            (nn.Conv2d(48, 64, (3, 5), stride=2, padding="valid", bias=False), image),
            (nn.Conv2d(48, 64, 3, padding=2, dilation=2, padding_mode="reflect"), image),
            (nn.Conv2d(48, 64, (1, 7), padding=(0, 3), padding_mode="circular"), image),
            (nn.Conv2d(48, 96, 3, groups=2), image),
            (nn.Conv2d(48, 128, 1), image),
        ]


class TestConv3d(LayerContract):
    dense_class = nn.Conv3d

    def cases(self):
        volume = torch.randn(2, 24, 5, 6, 7)
        return [
            (nn.Conv3d(24, 32, 3, padding=1), volume),
            (nn.Conv3d(24, 40, (1, 2, 3), stride=(1, 2, 1), padding_mode="circular"), volume),
            (nn.Conv3d(24, 96, 1, bias=False), volume),
        ]


def note(layer, **options):
    model = fedpara.convert(nn.Sequential(layer, nn.Linear(64, 64)), **options)
    return type(model[0]), fedpara.report(model).rows[0].note


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv2d(3, 64, 7), ["smaller side is 3", "first"]),
        (nn.Conv2d(256, 256, 3, groups=256), ["smaller side is 1", "depthwise"]),
        (nn.Conv1d(64, 64, 9, groups=32), ["smaller side is 2", "depthwise"]),
        (nn.Conv2d(8, 8, 3), ["576 parameters", "min_size"]),
        (nn.Conv2d(64, 6, 1), ["384 parameters", "min_size"]),
    ],
)
def test_first_depthwise_and_tiny_kernels_stay_dense_and_say_why(layer, words):
    kind, text = note(layer)
    assert kind is type(layer)
    for word in words:
        assert word in text


def test_the_smallest_side_that_is_factorised():
    assert note(nn.Conv2d(4, 64, 3))[0] is FactorisedConv2d


def test_the_factors_of_a_kernel_and_of_a_1x1_kernel():
    kernel = fedpara.convert(nn.Conv2d(32, 64, (3, 5), bias=False), rank=7)
    assert {name: tuple(p.shape) for name, p in kernel.named_parameters()} == {
        "x1": (64, 7), "y1": (32, 7), "t1": (7, 7, 3, 5),
        "x2": (64, 7), "y2": (32, 7), "t2": (7, 7, 3, 5),
    }  # fmt: skip
    matrix = fedpara.convert(nn.Conv2d(32, 64, 1, bias=False), rank=7)
    assert [name for name, _ in matrix.named_parameters()] == ["x1", "y1", "x2", "y2"]
