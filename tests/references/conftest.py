"""A small model, states that move like training, and both sides of an exchange."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.codecs import parse_codec
from fedpara_plugins.references import (
    ClientReferences,
    GridDownlink,
    LostReferenceError,
    PerClientDownlink,
)
from fedpara_plugins.stages.stage import tensor_bytes

SCHEMES = {"per client": PerClientDownlink, "grid": GridDownlink}
LIMIT = 10**7


def small_model(init="seeded", **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 5), nn.BatchNorm1d(5))
    return fedpara.convert(net, method="fedpara", gamma=0.1, init=init, **options)


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def moved(state, seed, size=0.01):
    """The state after a round: floating tensors a little off, counters one further."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (value + size * torch.randn(value.shape, generator=draw)).to(value.dtype)
        if value.is_floating_point()
        else value + 1
        for name, value in state.items()
    }


def identical(one, other):
    """Bit by bit, by names."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and tuple(one[name].shape) == tuple(other[name].shape)
        and bytes(tensor_bytes(one[name])) == bytes(tensor_bytes(other[name]))
        for name in one
    )


class Exchange:
    """A server's downlink and clients that may lose what they hold."""

    def __init__(self, downlink, *, codec="small", model=None, decoders=("ans", "zstd", "zlib")):
        self.downlink = downlink
        self.model = small_model() if model is None else model
        self.spec = fedpara.ModelSpec.of(self.model)
        self.state = state_of(self.model)
        self.codec = parse_codec(codec)
        self.decoders = decoders
        self.clients = {}

    def client(self, name):
        return self.clients.setdefault(name, ClientReferences())

    def sent(self, name, **options):
        return self.downlink.encode(
            name,
            "model",
            self.state,
            spec=self.spec,
            codec=self.codec,
            decoders=self.decoders,
            **options,
        )

    def round(self, name, *, keeps=True, answers=True):
        """One downlink with at most one repetition; the messages, and what was received."""
        messages = []
        for _ in range(2):
            messages.append(self.sent(name))
            try:
                received = self.client(name).receive("model", messages[-1].payload, limit=LIMIT)
            except LostReferenceError as lost:
                self.downlink.refused(name, "model", lost.holds)
                continue
            assert received.reference == messages[-1].reference
            assert identical(received.tensors, self.downlink.references[received.reference])
            if keeps:
                self.client(name).keep("model", received)
            if keeps and answers:
                self.downlink.acknowledge(name, "model", received.reference)
            return messages, received
        raise AssertionError(f"{name} was not served within the round")


@pytest.fixture
def helpers():
    """The functions above, for tests that need more than `exchange`."""
    import types

    return types.SimpleNamespace(
        small_model=small_model,
        state_of=state_of,
        moved=moved,
        identical=identical,
        Exchange=Exchange,
        SCHEMES=SCHEMES,
        LIMIT=LIMIT,
    )


@pytest.fixture(params=list(SCHEMES))
def scheme(request):
    return SCHEMES[request.param]


@pytest.fixture
def exchange(scheme):
    made = Exchange(scheme())
    yield made
    made.downlink.close()
