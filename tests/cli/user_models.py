"""Factories such as a user has them; the tests copy this file into a folder of its own."""

import torch
from torch import nn

import fedpara_plugins as fedpara


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3)
        self.norm = nn.BatchNorm2d(64)
        self.body = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64 * 16, 20)

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x))))


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64 * 16, 30)


class Subclassed(nn.Linear):
    pass


ready = Net()


def number():
    return 7


def broken():
    raise RuntimeError("no such\ndata set")


def sick():
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    return model


def shared():
    layer = nn.Linear(64, 64)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    return model


def lazy():
    return nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64))


def parametrised():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.utils.parametrizations.spectral_norm(model[0])
    return model


def own_kinds():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(64, 64))

    return nn.Sequential(Subclassed(64, 64), Own(), nn.Linear(64, 64))


def tiny():
    return nn.Linear(3, 3)


def trained():
    model = nn.Sequential(nn.Linear(128, 128))
    with torch.no_grad():
        model[0].weight += torch.ones(128, 128)
    return model


def built_too_early():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fedpara.convert(model, method="fedpara", gamma=0.3), optimizer


def built_in_time():
    model = fedpara.convert(nn.Sequential(nn.Linear(64, 64)), method="fedpara", gamma=0.3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def never_converted():
    model = nn.Linear(64, 64)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)
