"""A client loads the state that a message names, and not all that it holds."""

from __future__ import annotations

import gc

import torch

from fedpara_plugins import ModelSpec
from fedpara_plugins.codecs import encode_payload, parse_codec, reference_hash
from fedpara_plugins.references import ClientReferences, DecodedDownlink, client


class Counted(dict):
    """A state that knows how many of them are alive."""

    alive = most = 0

    def __init__(self, tensors):
        super().__init__(tensors)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


def test_one_state_is_in_memory_at_a_time(monkeypatch):
    spec = ModelSpec(weights={}, keys=("w",), seed=0)
    held = ClientReferences()
    states = [{"w": torch.full((9,), float(number))} for number in range(2)]
    against = None
    for state in states:
        data = encode_payload(
            state, codec=parse_codec("delta"), reference=against, model=spec.to_json()
        )
        found = held.receive("m", data, limit=1000)
        held.keep("m", DecodedDownlink(state, reference_hash(state), found.header))
        against = state
    assert held.holds("m") == tuple(map(reference_hash, reversed(states)))
    load = ClientReferences._state
    monkeypatch.setattr(client.ClientReferences, "_state", lambda *args: Counted(load(*args)))
    gc.collect()
    for state in states:
        data = encode_payload(state, codec=parse_codec("delta"), reference=state)
        assert torch.equal(held.receive("m", data, limit=1000).tensors["w"], state["w"])
    assert Counted.most == 1
