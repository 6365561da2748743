import torch
from torch import nn

from fedpara_plugins.testing.layer_contract import LayerContract


class TestLSTM(LayerContract):
    dense_class = nn.LSTM

    def cases(self):
        x = torch.randn(5, 3, 32)
        state = (torch.randn(4, 3, 32), torch.randn(4, 3, 48))
        both = {"num_layers": 2, "bidirectional": True}
        return [
            (nn.LSTM(32, 40), x),
            (nn.LSTM(32, 24, num_layers=2, batch_first=True, bias=False), x),
            (nn.LSTM(32, 48, proj_size=32, **both), (x, state)),
        ]


class TestGRU(LayerContract):
    dense_class = nn.GRU

    def cases(self):
        x = torch.randn(5, 3, 32)
        both = {"num_layers": 2, "bidirectional": True}
        return [
            (nn.GRU(32, 40, batch_first=True), x),
            (nn.GRU(32, 32, bias=False, **both), (x, torch.randn(4, 3, 32))),
        ]
