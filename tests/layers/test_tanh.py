"""The contract once more, with tanh on every operand."""

import torch
from torch import nn

from fedpara_plugins.testing.layer_contract import LayerContract


class TestLinearWithTanh(LayerContract):
    dense_class = nn.Linear
    options = {"tanh": True}

    def cases(self):
        return [(nn.Linear(96, 160), torch.randn(5, 96))]


class TestConv2dWithTanh(LayerContract):
    dense_class = nn.Conv2d
    options = {"tanh": True}

    def cases(self):
        return [(nn.Conv2d(48, 64, 3, padding=1), torch.randn(2, 48, 9, 8))]
