"""The way back to a dense model."""

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConversionError
from fedpara_plugins.layers import FactorisedLinear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3)
        self.norm = nn.BatchNorm2d(64)
        self.body = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64 * 16, 20)

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x))))


def test_whole_model_goes_back_to_dense_after_training():
    torch.manual_seed(1)
    model = fedpara.convert(Net(), method="fedpara", gamma=0.3, init="random")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    plain = Net()
    plain.load_state_dict(fedpara.to_dense(model).state_dict(), strict=True)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert fedpara.report(plain).parameters == fedpara.report(Net()).parameters


def test_to_dense_shares_nothing():
    model = fedpara.convert(Net(), method="fedpara")
    dense = fedpara.to_dense(model)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert all(p.abs().sum() > 0 for p in model.head.parameters())
    assert type(model.head) is FactorisedLinear


def test_what_is_tied_and_dense_stays_tied_on_the_way_back():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    model[1].bias = model[0].bias
    dense = fedpara.to_dense(fedpara.convert(model, method="fedpara"))
    assert dense[1].bias is dense[0].bias
    assert dense[0].bias is not model[0].bias


def test_export_of_a_diverged_model_names_the_layer():
    model = fedpara.convert(Net(), method="fedpara")
    model.head.x1.data.fill_(float("inf"))
    with pytest.raises(ConversionError, match="'head'"):
        fedpara.to_dense(model)


def test_back_to_dense_with_a_lazy_layer_that_has_not_run():
    model = nn.Sequential(nn.Linear(40, 48), nn.LazyLinear(10))
    model = fedpara.convert(model, method="fedpara", gamma=0.2, exclude=("1",))
    assert isinstance(fedpara.to_dense(model)[1], nn.LazyLinear)
