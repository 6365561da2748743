import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.testing.layer_contract import LayerContract


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
def test_variance_is_that_of_torch_which_counts_the_second_side(groups):
    """Not of the true number of inputs per output: 256 channels in, 32 out."""
    dense = nn.ConvTranspose2d(256, 32, 3, groups=groups)
    layer = fedpara.convert(dense, method="fedpara", gamma=0.5)
    second_side = 32 // groups * 9
    assert layer.plans["weight"].variance == pytest.approx(1 / (3 * second_side))
    assert dense.weight.var().item() == pytest.approx(1 / (3 * second_side), rel=0.05)


def test_output_size_can_still_be_asked_for():
    layer = fedpara.convert(nn.ConvTranspose2d(32, 32, 3, stride=2), method="fedpara")
    image = torch.randn(1, 32, 4, 4)
    assert layer(image, output_size=[10, 9]).shape == (1, 32, 10, 9)
    torch.testing.assert_close(
        layer(image, output_size=[10, 9]), fedpara.to_dense(layer)(image, output_size=[10, 9])
    )
