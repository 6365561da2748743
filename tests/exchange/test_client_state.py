"""What a client keeps between rounds is bounded, whatever models a server describes."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins import ConfigError, FedParaConfig, convert
from fedpara_plugins.exchange import ClientState
from fedpara_plugins.exchange.client_state import MOST_PRIVATE, PRIVATE, private_key
from fedpara_plugins.models.spec import ModelSpec


def described(width):
    """A plain model with a private head of some width, and its private tensors."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, width))
    spec = ModelSpec.of(convert(model, FedParaConfig(method="none", private=("1.*",))))
    return spec, {name: torch.full((width,), float(width)) for name in spec.private_keys}


def test_private_states_are_bounded_and_none_makes_room_for_another():
    storage = {}
    state = ClientState(storage, "7", "its file")
    mine, kept = described(1)
    state.keep_private(mine, kept)
    for width in range(2, MOST_PRIVATE + 1):
        state.keep_private(*described(width))
    other, values = described(MOST_PRIVATE + 1)
    with pytest.raises(ConfigError, match="client 7 holds private state of 32 models in its file"):
        state.keep_private(other, values)
    assert sum(key.startswith(PRIVATE) for key in storage) == MOST_PRIVATE
    assert private_key(other) not in storage
    state.keep_private(mine, {name: 2 * value for name, value in kept.items()})  # goes on
    assert torch.equal(state._load(private_key(mine))["1.bias"], torch.full((1,), 2.0))
    state.keep_private(other, {})  # nothing private
