"""Bytes of later messages beside values and steps, with what both adapters write around them."""

from __future__ import annotations

import pytest
from lora_states import lora_state

from fedpara_plugins import ModelSpec
from fedpara_plugins.codecs.payload import open_payload
from fedpara_plugins.exchange import plain_spec


def beside_values(payload, known):
    """Bytes of a payload without its stream and its steps, as the float32 that they are."""
    opened = open_payload(payload, limit=10**9, descriptions=known)
    steps = sum(4 * len(note.get("scopes", "")) for note in opened.header.notes)
    return len(payload) - opened.container.body.nbytes - steps


@pytest.mark.parametrize("codec", ["lossless", "balanced", "small"])
@pytest.mark.parametrize("method", ["none", "fedpara", "pfedpara"])
def test_later_payloads_take_119_bytes_in_both_directions(helpers, codec, method):
    """FedML's envelope adds 60 bytes to a message and 81 to a reply, Flower's marker 59."""
    pair = helpers.Pair(codec=codec, method=method)
    if method == "none":
        pair.state = lora_state(12)
        pair.spec = plain_spec(pair.state)
        pair.encoder.put("model", pair.state, pair.spec)
        assert isinstance(pair.spec, ModelSpec)
    for number in range(3):
        sent = pair.payloads()
        client_round = pair.round(own=pair.own(complete=False))
        client_round.receive(sent)
        answer = helpers.moved(client_round.received["model"].user_tensors, seed=number)
        answered = client_round.encode(client_round.prepare_reply({"model": answer}))
        client_round.keep()
        reader = pair.reader()
        reader.read_all(answered)
        holds = {**reader.references, **client_round.received_hashes}
        pair.encoder.acknowledge("7", holds, client_round.decoders)
        if number:
            known = pair.encoder.descriptions
            assert beside_values(sent["model"], known) <= 119
            assert beside_values(answered["model"], known) <= 119
        pair.state = helpers.moved(pair.state, seed=10 + number)
        pair.encoder.put("model", pair.state, pair.spec)
