"""A character model: table, two recurrent layers, head."""

import torch
from torch import nn
from torch.nn import functional as F

from fedpara_plugins.layers import FactorisedEmbedding, FactorisedLinear

TEXT = torch.tensor(list(b"Whatever is composed of factors can be put together again. " * 4))
INPUTS, TARGETS = TEXT[:-1].view(5, -1), TEXT[1:].view(5, -1)


class CharacterModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, 32, padding_idx=0)
        self.lstm = nn.LSTM(32, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, 128)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0])


def output(model):
    return model(INPUTS)


def loss(model):
    return F.cross_entropy(output(model).flatten(0, 1), TARGETS.flatten())


def test_lstm_character_model(journey):
    model = journey(
        CharacterModel, output, loss, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), steps=20
    )
    assert type(model.embedding) is FactorisedEmbedding
    assert type(model.head) is FactorisedLinear
    assert isinstance(model.lstm, nn.LSTM)
    assert not model.embedding.weight[0].any()
