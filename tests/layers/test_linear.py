import torch
from torch import nn

from fedpara_plugins.testing.layer_contract import LayerContract


class TestLinear(LayerContract):
    dense_class = nn.Linear

    def cases(self):
        return [
            (nn.Linear(96, 160), torch.randn(5, 96)),
            (nn.Linear(300, 70, bias=False), torch.randn(2, 3, 300)),
        ]
