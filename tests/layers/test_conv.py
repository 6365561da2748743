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


class TestConvTranspose1d(LayerContract):
    dense_class = nn.ConvTranspose1d

    def cases(self):
        series = torch.randn(2, 64, 9)
        return [
            (nn.ConvTranspose1d(64, 40, 4, stride=2, padding=1), series),
            (nn.ConvTranspose1d(64, 80, 3, stride=3, output_padding=2, groups=2), series),
        ]


class TestConvTranspose2d(LayerContract):
    dense_class = nn.ConvTranspose2d

    def cases(self):
        image = torch.randn(2, 80, 5, 6)
        return [
            (nn.ConvTranspose2d(80, 32, 3), image),
            (
                nn.ConvTranspose2d(80, 32, (3, 5), stride=2, output_padding=(1, 0), bias=False),
                image,
            ),
            (nn.ConvTranspose2d(80, 96, 3, groups=2, dilation=2, padding=1), image),
            (nn.ConvTranspose2d(80, 96, 1), image),
        ]


class TestConvTranspose3d(LayerContract):
    dense_class = nn.ConvTranspose3d

    def cases(self):
        volume = torch.randn(2, 32, 3, 4, 3)
        return [
            (nn.ConvTranspose3d(32, 20, 2, stride=2), volume),
            (nn.ConvTranspose3d(32, 24, (1, 3, 2), stride=2, output_padding=1), volume),
        ]


@pytest.mark.parametrize("groups", [1, 4])
def test_variance_of_a_transpose_is_that_of_torch_which_counts_the_second_side(groups):
    """Not of the true number of inputs per output: 256 channels in, 32 out."""
    dense = nn.ConvTranspose2d(256, 32, 3, groups=groups)
    layer = fedpara.convert(dense, method="fedpara", gamma=0.5, variance="torch")
    second_side = 32 // groups * 9
    assert layer.plans["weight"].variance == pytest.approx(1 / (3 * second_side))
    assert dense.weight.var().item() == pytest.approx(1 / (3 * second_side), rel=0.05)


def test_the_output_size_of_a_transpose_can_be_asked_for():
    layer = fedpara.convert(nn.ConvTranspose2d(32, 32, 3, stride=2), method="fedpara")
    image = torch.randn(1, 32, 4, 4)
    assert layer(image, output_size=[10, 9]).shape == (1, 32, 10, 9)
    torch.testing.assert_close(
        layer(image, output_size=[10, 9]), fedpara.to_dense(layer)(image, output_size=[10, 9])
    )
