"""Both sides of an exchange, with nothing between them but payloads."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ModelSpec
from fedpara_plugins.exchange import (
    ClientRound,
    ClientState,
    DownlinkEncoder,
    ExchangeSettings,
    OwnModel,
    OwnModels,
    ReplyReader,
    zero_private_factors,
)

SIDE = {"variate": "side", "change": "update"}


def settings_of(**options):
    return ExchangeSettings(**ExchangeSettings.read(dict(options)))


def kind_of(record):
    return SIDE.get(record, "model")


def converted(method="pfedpara", seed=0, **options):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 5), nn.BatchNorm1d(5))
    # Seeded factors would take no bytes at first contact.
    options = {"gamma": 0.3, "min_size": 256, "init": "random", **options}
    return fedpara.convert(net, method=method, **options)


def moved(state, seed=1, size=0.01):
    """A state after training: floats a little off, counters one further."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: value + size * torch.randn(value.shape, generator=draw)
        if value.is_floating_point()
        else value + 1
        for name, value in state.items()
    }


class Pair:
    """A server and one client of it.

    Attributes:
        spec: of the model.
        state: what the server sends as ``model``.
        storage: of the client.
    """

    def __init__(self, method="pfedpara", **options):
        self.settings = settings_of(method=method, gamma=0.3, min_size=256, **options)
        model = converted(method, private=self.settings.config.private)
        self.spec = ModelSpec.of(model)
        server = copy.deepcopy(model)
        zero_private_factors(server)
        self.state = {k: v.detach().clone() for k, v in server.state_dict().items()}
        self.storage = {}
        self.encoder = DownlinkEncoder(self.settings)
        self.encoder.put("model", self.state, self.spec)

    def payloads(self, *records):
        return self.encoder.encode_all("7", records or ("model",))

    def round(self, **options):
        state = ClientState(self.storage, "7")
        return ClientRound(
            self.settings, state, **{"own": self.own(), "kind_of": kind_of, **options}
        )

    def own(self, spec=None, **options):
        """The client's own model, known before the message comes."""
        model = OwnModel(spec or self.spec, sum(value.nbytes for value in self.state.values()))
        return OwnModels(self.settings.config, [model], **{"complete": True, **options})

    def received(self, **options):
        """A round of the client, its message received."""
        found = self.round(**options)
        found.receive(self.payloads())
        return found

    def reader(self, **options):
        own = {"kind_of": kind_of, "model_of": lambda tensors: self.spec, "strict": True}
        return ReplyReader(self.encoder, **{**own, **options})

    @property
    def shared(self):
        return {key: self.state[key] for key in self.spec.shared_keys}

    def kept(self):
        """The private values that the client holds, and whether they are the first ones."""
        return ClientState(self.storage, "7").private(self.spec, self.shared)


@pytest.fixture
def helpers():
    """What tests cannot import, since this folder is no package."""
    return SimpleNamespace(
        Pair=Pair, settings_of=settings_of, kind_of=kind_of, converted=converted, moved=moved
    )
