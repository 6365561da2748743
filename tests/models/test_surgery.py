"""Layers in plain containers of a model, and copies of models in use."""

import torch
from torch import nn

import fedpara_plugins as fedpara


class InPlainContainers(nn.Module):
    """Its forward takes layers from where torch does not look."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(40, 48), nn.Linear(48, 48), nn.Linear(48, 40)
        self.order = [self.a, (self.b, {"last": self.c})]

    def forward(self, x):
        (first, (second, others)) = self.order
        return others["last"](second(first(x).relu()).relu())


def test_layers_in_plain_lists_are_replaced_too():
    model = fedpara.convert(InPlainContainers(), method="fedpara", gamma=0.2)
    x = torch.randn(3, 40)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    dense = fedpara.to_dense(model)
    assert dense.order[0] is dense.a
    assert dense.order[1][1]["last"] is dense.c
    assert type(dense.c) is nn.Linear
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)
    assert type(model.order[0]) is not nn.Linear  # the model itself stays as it is


def test_one_layer_in_two_places_goes_back_to_one():
    layer = fedpara.convert(nn.Linear(64, 64), method="fedpara")
    dense = fedpara.to_dense(nn.Sequential(layer, nn.ReLU(), layer))
    assert type(dense[0]) is nn.Linear
    assert dense[0] is dense[2]
    nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).load_state_dict(
        dense.state_dict()
    )


class KeepsFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head, self.features = nn.Linear(40, 48), nn.Linear(48, 40), []

    def forward(self, x):
        self.last = self.layer(x)
        self.features = [self.last, {"relu": self.last.relu()}]
        return self.head(self.features[1]["relu"])


def test_back_to_dense_with_results_of_the_last_forward():
    model = fedpara.convert(KeepsFeatures(), method="fedpara", gamma=0.2)
    x = torch.randn(3, 40)
    model(x).sum().backward()
    dense = fedpara.to_dense(model)
    assert not dense.last.requires_grad
    assert dense.last is dense.features[0]
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)
