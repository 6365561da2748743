import torch
from torch import nn

from fedpara_plugins.testing.layer_contract import LayerContract


class TestMultiheadAttention(LayerContract):
    dense_class = nn.MultiheadAttention

    def cases(self):
        x, memory = torch.randn(5, 3, 48), torch.randn(7, 3, 48)
        padding = torch.arange(7) >= torch.tensor([[7], [4], [6]])
        wide, narrow = torch.randn(3, 7, 64), torch.randn(3, 7, 40)
        return [
            (nn.MultiheadAttention(48, 4), (x, x, x)),
            (nn.MultiheadAttention(48, 3, bias=False, add_zero_attn=True), (x, memory, memory)),
            (nn.MultiheadAttention(48, 4, add_bias_kv=True), (x, memory, memory, padding)),
            (
                nn.MultiheadAttention(48, 4, kdim=64, vdim=40, batch_first=True),
                (x.transpose(0, 1), wide, narrow, padding),
            ),
        ]
