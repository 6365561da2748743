"""Rounds of which the messages leave out frozen tensors."""

from __future__ import annotations

import math

import pytest
import torch

from fedpara_plugins import MismatchError, ModelSpec, TooLargeError
from fedpara_plugins.codecs import encode_payload, parse_codec
from fedpara_plugins.exchange import ClientState, DownlinkEncoder, frozen_record, plain_spec
from fedpara_plugins.models.frozen import frozen_tensors
from fedpara_plugins.references import LostReferenceError


class FrozenPair:
    """A server and a client whose model has a first layer that is frozen after its conversion."""

    def __init__(self, helpers, method, **options):
        self.pair = helpers.Pair(method, codec="lossless", **options)
        self.model = helpers.converted(method)
        self.model[0].requires_grad_(False)
        self.pair.encoder = DownlinkEncoder(self.pair.settings)
        self.put(self.pair.state)

    def put(self, state):
        frozen = frozen_tensors(self.model)
        self.pair.encoder.put("model", state, self.pair.spec, frozen=frozen)

    def round(self, **options):
        own = [(ModelSpec.of(self.model), self.model.state_dict())]
        return self.pair.round(**{"states": lambda: own, **options})


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
@pytest.mark.parametrize("local", ["factors", "dense"])
def test_frozen_factors_of_a_layer_stay_on_both_sides(helpers, method, local):
    found = FrozenPair(helpers, method, local=local)
    client_round = found.round()
    client_round.receive(found.pair.payloads())
    part = client_round.received["model"]
    factors = {f"0.{name}" for name in ("x1", "y1", "x2", "y2")} & set(found.pair.spec.shared_keys)
    assert set(part.spec.frozen) == factors | {"0.bias"}
    assert not set(part.held.tensors) & set(part.spec.frozen)
    assert all(torch.equal(part.full[k], found.pair.state[k]) for k in found.pair.spec.shared_keys)
    given = part.user_tensors
    after = {k: v if k.startswith("0.") else helpers.moved({k: v})[k] for k, v in given.items()}
    payloads = client_round.encode(client_round.prepare_reply({"model": after}))
    read = found.pair.reader().read("model", payloads["model"])
    assert not set(read.shared) & set(part.spec.frozen)
    assert tuple(read.state) == found.pair.spec.keys


@pytest.mark.parametrize("local", ["factors", "dense"])
def test_what_a_client_has_trained_of_them_is_not_dropped_in_silence(helpers, local):
    found = FrozenPair(helpers, "fedpara", local=local)
    client_round = found.round()
    client_round.receive(found.pair.payloads())
    after = helpers.moved(client_round.received["model"].user_tensors)
    after["0.bias"] = found.pair.state["0.bias"]
    with pytest.raises(MismatchError, match=r"this client has changed '0\.[xy]\d'"):
        client_round.prepare_reply({"model": after})
    assert client_round.prepare_reply({"model": after}, noisy=True)


def test_a_frozen_mask_stays_frozen_where_a_strategy_loses_its_infinities(helpers):
    encoder = DownlinkEncoder(helpers.settings_of(codec="small"))
    mask = torch.tensor([0.0, -math.inf])
    spec = plain_spec(["mask", "a"])
    encoder.put("model", {"mask": mask, "a": torch.ones(2)}, spec, frozen={"mask": mask})
    encoder.put("model", {"mask": mask - mask + mask, "a": torch.zeros(2)}, spec)
    assert set(encoder.spec("model").frozen) == {"mask"}
    assert torch.equal(encoder.content("model")["mask"], mask)


def test_a_client_that_has_lost_a_description_says_so_before_its_model_is_compared(helpers):
    """FedML's clients take over plans from a header before they decode a message."""
    pair = helpers.Pair("fedpara", codec="balanced")
    for _ in range(2):
        client_round = pair.received()
        answer = client_round.received["model"].user_tensors
        pair.reader().read_all(client_round.encode(client_round.prepare_reply({"model": answer})))
        client_round.keep()
        pair.encoder.acknowledge("7", client_round.received_hashes, client_round.decoders)
    pair.storage.clear()
    with pytest.raises(LostReferenceError, match="description"):
        (client_round := pair.round()).described_plans(pair.payloads())
    assert client_round.known_hashes() == {"model": ()}
    pair.encoder.note_refusal("7", client_round.known_hashes())
    assert client_round.described_plans(pair.payloads())[0].weights == pair.spec.weights


# Frozen tensors that travel once


def payload_of(tensors):
    return encode_payload(tensors, codec=parse_codec("lossless").first_contact())


def test_of_a_copy_only_the_frozen_tensors_are_kept_and_only_of_few_records(helpers):
    found = FrozenPair(helpers, "fedpara")
    sent = found.pair.payloads()["model"]
    frozen = found.pair.encoder.spec("model").frozen
    copy = payload_of({**{k: found.pair.state[k] for k in frozen}, "other": torch.ones(9)})
    for number in range(20):
        name = f"model{number}"
        client_round = found.round(states=tuple)
        client_round.receive(
            {name: sent, frozen_record(name): copy, frozen_record("elsewhere"): copy}
        )
        assert torch.equal(client_round.received[name].full["0.x1"], found.pair.state["0.x1"])
        client_round.keep()
        assert set(ClientState(found.pair.storage).frozen(name)) == set(frozen)
    assert sum(key.startswith("frozen/") for key in found.pair.storage) == 16
    assert ClientState(found.pair.storage).frozen("elsewhere") == {}


def test_copies_share_one_bound_in_bytes_and_in_number(helpers):
    found = FrozenPair(helpers, "fedpara")
    sent = found.pair.payloads()["model"]
    zeros = payload_of({"0.x1": torch.zeros(3 * 2**18)})  # 3 MiB, and own models allow 4
    found.round().receive({"a": sent, frozen_record("a"): zeros})
    with pytest.raises(TooLargeError):
        found.round().receive(
            {"a": sent, "b": sent, frozen_record("a"): zeros, frozen_record("b"): zeros}
        )
    many = payload_of({f"n{n}": torch.zeros(1) for n in range(200)})
    with pytest.raises(TooLargeError, match="holds 200 tensors"):
        found.round().receive({"a": sent, frozen_record("a"): many})
