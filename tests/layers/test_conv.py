import torch
from torch import nn

from fedpara_plugins.testing.layer_contract import LayerContract


class TestConv2d(LayerContract):
    dense_class = nn.Conv2d

    def cases(self):
        image = torch.randn(2, 48, 9, 8)
        return [
            (nn.Conv2d(48, 64, 3, padding=1), image),
            (nn.Conv2d(48, 64, (3, 5), stride=2, padding="valid", bias=False), image),
            (nn.Conv2d(48, 64, 3, padding=2, dilation=2, padding_mode="reflect"), image),
            (nn.Conv2d(48, 96, 3, groups=2), image),
            (nn.Conv2d(48, 128, 1), image),
        ]
