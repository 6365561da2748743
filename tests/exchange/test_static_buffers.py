"""Buffers that no training changes: in no message, and a client that changes one is heard."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedpara_plugins import MismatchError, ModelSpec, PayloadError
from fedpara_plugins.codecs import encode_payload, parse_codec
from fedpara_plugins.exchange import (
    ClientRound,
    ClientState,
    DownlinkEncoder,
    LacksFrozenError,
    OwnModel,
    OwnModels,
    ReplyReader,
)
from fedpara_plugins.exchange.frozen import changed_record
from fedpara_plugins.models import frozen_tensors, static_buffers

STATIC = {"table", "mask", "places"}


class Net(nn.Module):
    """A table, a mask and places that never change; a norm that counts; a small scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(80)
        self.register_buffer("table", torch.arange(512.0).sin().view(64, 8))
        self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).tril())
        self.register_buffer("places", torch.arange(64))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("unsaved", torch.ones(100), persistent=False)


class Two:
    """A server and a client of this model."""

    def __init__(self, helpers, codec="small", buffers=True):
        self.helpers = helpers
        self.settings = helpers.settings_of(method="none", codec=codec)
        self.model = Net()
        self.spec = ModelSpec.of(self.model)
        self.state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.own = {k: v.clone() for k, v in self.state.items()}
        self.encoder = DownlinkEncoder(self.settings)
        self.storage = {}
        self.put(static_buffers(self.model) if buffers else {})

    def put(self, buffers=None):
        found = buffers or {}
        self.encoder.put("model", self.state, self.spec, frozen=found, buffers=set(found))

    def received(self):
        nbytes = sum(value.nbytes for value in self.state.values())
        self.client = ClientRound(
            self.settings,
            ClientState(self.storage, "7"),
            own=OwnModels(self.settings.config, [OwnModel(self.spec, nbytes)], complete=True),
            kind_of=self.helpers.kind_of,
            states=lambda: [(self.spec, self.own)],
        )
        self.sent = self.encoder.encode_all("7", ("model",))
        return self.client.receive(self.sent)["model"]

    def round(self, **changes):
        """One round: what the client trains is moved, and some tensors become others."""
        given = self.received().user_tensors
        after = {
            name: value if name in STATIC | {"scale"} else self.helpers.moved({name: value})[name]
            for name, value in given.items()
        }
        leaving = self.client.prepare_reply({"model": {**after, **changes}})
        self.answered = self.client.encode(leaving)
        self.client.keep()
        reader = self.reader()
        self.read = reader.read_all(self.answered)["model"]
        holds = {**reader.references, **self.client.received_hashes}
        self.encoder.acknowledge("7", holds, self.client.decoders)
        self.state = dict(self.read.state)
        self.put()
        return self.read

    def reader(self):
        return ReplyReader(
            self.encoder,
            kind_of=self.helpers.kind_of,
            model_of=lambda tensors: self.spec,
            strict=True,
        )


def names(two):
    return set(two.encoder.shared_names("model"))


def test_which_buffers_are_static():
    assert set(static_buffers(Net())) == STATIC
    spectral = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(99, 99)))
    assert not static_buffers(spectral)
    assert not static_buffers(Net().requires_grad_(False))
    assert not frozen_tensors(Net())


@pytest.mark.parametrize("codec", ["lossless", "delta+planes+zlib", "small"])
def test_they_are_in_no_message_and_the_values_are_the_same(helpers, codec):
    two, all_sent = Two(helpers, codec), Two(helpers, codec, buffers=False)
    for _ in range(3):
        read, other = two.round(), all_sent.round()
        assert not names(two) & STATIC
        assert set(read.shared) == set(two.state) - STATIC
        assert read.state.keys() == other.state.keys()
        if codec != "small":  # which has one table of symbols for all tensors
            assert all(torch.equal(read.state[k], other.state[k]) for k in read.state)
        assert len(two.answered["model"]) < len(all_sent.answered["model"])
        assert len(two.sent["model"]) < len(all_sent.sent["model"])


@pytest.mark.parametrize("codec", ["lossless", "small"])
@pytest.mark.parametrize("name", sorted(STATIC))
def test_a_client_that_changes_one_is_heard(helpers, codec, name):
    two = Two(helpers, codec)
    two.round()
    value = two.state[name].clone()
    value.view(-1)[3] = not value.view(-1)[3] if value.dtype == torch.bool else 7
    read = two.round(**{name: value})
    assert set(two.answered) == {"model", changed_record("model")}
    assert torch.equal(read.state[name], value)
    assert torch.equal(read.shared[name], value)
    for _ in range(2):  # from now on it is sent
        assert names(two) & STATIC == {name}
        for again in (two.received().user_tensors[name], two.round().state[name]):
            torch.testing.assert_close(again, value, rtol=0, atol=0.05)
        assert set(two.answered) == {"model"}


def test_a_change_below_an_averages_rounding_is_heard_too(helpers):
    two = Two(helpers, "lossless")
    two.round()
    value = two.state["table"] * (1 + 1e-6)
    two.round(table=value)
    assert torch.equal(two.received().user_tensors["table"], value)


def test_an_average_of_what_nobody_has_changed_is_no_change(helpers):
    two = Two(helpers)
    two.round()
    two.state["table"] = (two.state["table"].double() * 0.1 * 10).float() * (1 + 1e-7)
    two.put()
    assert not names(two) & STATIC


def test_a_client_whose_model_holds_another_is_sent_it_once(helpers):
    two = Two(helpers)
    two.own["table"] = two.own["table"] + 1
    with pytest.raises(LacksFrozenError) as caught:
        _ = two.received().user_tensors
    two.encoder.note_lacking("7", [caught.value.record])
    assert two.encoder.frozen_payload("7", "model") is not None


def test_noise_on_all_tensors_is_no_change(helpers):
    two = Two(helpers)
    noisy = helpers.moved(two.received().user_tensors)
    leaving = two.client.prepare_reply({"model": noisy}, noisy=True)
    assert set(two.client.encode(leaving)) == {"model"}


def payload_of(**tensors):
    return encode_payload(tensors, codec=parse_codec("none"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layer.weight": torch.zeros(8, 8)}, "left out no such buffer"),
        ({"other": torch.zeros(64, 8)}, "left out no such buffer"),
        ({"table": torch.zeros(8, 64)}, "shape"),
        ({"table": torch.full((64, 8), torch.nan)}, "NaN"),
        ({"table": torch.full((64, 8), torch.inf)}, "infinite"),
        ({"mask": torch.zeros(64, 64)}, "does not cast"),
    ],
)
def test_what_a_stranger_may_send_of_them(helpers, changed, words):
    two = Two(helpers)
    two.round()
    two.round()
    with pytest.raises(PayloadError, match=words):
        two.reader().read_all({**two.answered, changed_record("model"): payload_of(**changed)})
    assert not names(two) & STATIC


def test_they_do_not_come_without_their_record(helpers):
    two = Two(helpers)
    two.round()
    alone = {changed_record("model"): payload_of(table=two.state["table"])}
    with pytest.raises(MismatchError, match="without its record"):
        two.reader().read_all(alone)
    with pytest.raises(MismatchError, match="without its record"):
        two.reader().read_all({**two.answered, changed_record("x"): alone["fedpara_changed_model"]})


def test_a_frozen_parameter_is_no_buffer(helpers):
    two = Two(helpers)
    two.encoder = DownlinkEncoder(two.settings)
    weight = {"layer.weight": two.state["layer.weight"]}
    two.encoder.put("model", two.state, two.spec, frozen=weight)
    with pytest.raises(MismatchError, match=r"has changed 'layer\.weight'"):
        two.round(**{"layer.weight": torch.zeros(8, 8)})


def test_the_description_tells_buffers_from_parameters(helpers):
    two = Two(helpers)
    spec = two.encoder.spec("model")
    shared = two.encoder.shared_names("model")
    again = ModelSpec.from_json(spec.to_json(), shared)
    assert (again.frozen, again.buffers) == (spec.frozen, frozenset(STATIC))
    for wrong in ([99], [True], ["table"], {}, [3]):
        with pytest.raises(PayloadError, match="malformed"):
            ModelSpec.from_json({**spec.to_json(), "buffers": wrong}, shared)
