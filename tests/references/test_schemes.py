"""What both schemes promise for one message: kinds, repetition, refusal, dtypes, the wire."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.codecs import parse_codec, peek_header, reference_hash
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.references import (
    ClientReferences,
    LostReferenceError,
    PerClientDownlink,
    version_zero,
)
from fedpara_plugins.references import per_client as per_client_module


def test_a_newcomer_gets_only_what_differs_from_version_zero(exchange, helpers):
    (message,), received = exchange.round("a")
    assert message.kind == "first"
    for name in ("0.x1", "0.y1", "0.x2", "0.y2"):
        assert helpers.identical({name: received.tensors[name]}, {name: exchange.state[name]})
    assert len(message.payload) < sum(v.nbytes for v in exchange.state.values()) / 2


def test_a_server_that_started_elsewhere_sends_its_weights_once_and_finely(scheme, helpers, caplog):
    caplog.set_level(logging.INFO, "fedpara.references")
    exchange = helpers.Exchange(scheme(), model=helpers.small_model("random"))
    (message,), received = exchange.round("a")
    assert message.kind == "first"
    assert f"holds nothing yet takes {len(message.payload)} bytes" in caplog.text
    for name, value in exchange.state.items():
        if value.ndim > 1:
            error = (received.tensors[name] - value).norm() / value.norm()
            assert error < 0.005, name
    model = helpers.small_model("random").eval()
    images = torch.randn(256, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.load_state_dict(exchange.state)
        wanted = model(images)
        model.load_state_dict(received.tensors)
        error = (model(images) - wanted).norm() / (wanted - wanted.mean(0)).norm()
    assert error < 0.02
    exchange.state = helpers.moved(exchange.state, 1)
    (later,), _ = exchange.round("a")
    assert later.kind == "update"
    assert len(later.payload) < len(message.payload)


def test_the_same_content_again_costs_next_to_nothing(exchange, helpers):
    exchange.round("a")
    exchange.state = helpers.moved(exchange.state, 1)
    (update,), first = exchange.round("a")
    (repeat,), second = exchange.round("a")
    assert (update.kind, repeat.kind) == ("update", "repeat")
    assert len(repeat.payload) < len(update.payload)
    assert helpers.identical(first.tensors, second.tensors)


def test_clients_that_hold_the_same_share_one_encoding(exchange, monkeypatch):
    calls = []
    module = __import__(type(exchange.downlink).__module__, fromlist=["encode_payload"])
    plain = module.encode_payload
    monkeypatch.setattr(
        module, "encode_payload", lambda *a, **o: (calls.append(1), plain(*a, **o))[1]
    )
    payloads = {exchange.round("a")[0][0].payload}
    assert calls
    calls.clear()
    payloads |= {exchange.round(name)[0][0].payload for name in "bcde"}
    assert (len(payloads), len(calls)) == (1, 0)
    assert len(exchange.downlink.references) == 1


def test_a_client_that_lost_all_is_served_self_contained_within_the_round(exchange, helpers):
    exchange.round("a")
    exchange.state = helpers.moved(exchange.state, 1)
    exchange.clients["a"] = ClientReferences()
    messages, _ = exchange.round("a")
    assert [message.kind for message in messages] == ["update", "full"]
    exchange.state = helpers.moved(exchange.state, 2)
    assert [message.kind for message in exchange.round("a")[0]] == ["update"]


def test_a_client_that_derives_another_version_zero_is_served_within_the_round(
    exchange, helpers, monkeypatch
):
    plain = version_zero._derived
    message = exchange.sent("a")
    # The client computes on another platform: the last bits of what it draws differ.
    monkeypatch.setattr(
        version_zero,
        "_derived",
        lambda kind, spec, like: {
            name: value * (1 + 2**-20) for name, value in plain(kind, spec, like).items()
        },
    )
    with pytest.raises(LostReferenceError, match="version 0") as lost:
        exchange.client("a").receive("model", message.payload, limit=10**7)
    assert lost.value.holds == ()
    exchange.downlink.refused("a", "model", lost.value.holds)
    monkeypatch.undo()
    again = exchange.sent("a")
    assert again.kind == "full"
    # No draw of any kind is behind a self-contained message.
    monkeypatch.setattr(version_zero, "seeded_shared", None)
    received = exchange.client("a").receive("model", again.payload, limit=10**7)
    assert received.reference == again.reference


def test_a_lost_answer_costs_no_second_message(exchange, helpers):
    exchange.round("a")
    for seed in range(1, 5):  # the client receives and keeps, and the server never hears of it
        exchange.state = helpers.moved(exchange.state, seed)
        messages, _ = exchange.round("a", answers=False)
        assert [message.kind for message in messages] == ["update"]
    exchange.state = helpers.moved(exchange.state, 9)
    assert len(exchange.round("a")[0]) == 1


def test_a_client_that_kept_nothing_of_a_failed_round_goes_on(exchange, helpers):
    exchange.round("a")
    exchange.state = helpers.moved(exchange.state, 1)
    exchange.round("a", keeps=False)
    exchange.state = helpers.moved(exchange.state, 2)
    assert [message.kind for message in exchange.round("a")[0]] == ["update"]


def test_answers_that_overtake_each_other_lose_nothing(helpers):
    exchange = helpers.Exchange(PerClientDownlink())
    exchange.round("a")
    older = exchange.sent("a")
    exchange.state = helpers.moved(exchange.state, 1)
    newer = exchange.sent("a")
    exchange.downlink.acknowledge("a", "model", newer.reference)
    exchange.downlink.acknowledge("a", "model", older.reference)
    assert newer.reference in exchange.downlink.references
    exchange.client("a").keep(
        "model", exchange.client("a").receive("model", newer.payload, limit=10**7)
    )
    exchange.state = helpers.moved(exchange.state, 2)
    assert [message.kind for message in exchange.round("a")[0]] == ["update"]


def test_an_answer_to_the_older_of_two_messages_keeps_the_newer_one(helpers):
    exchange = helpers.Exchange(PerClientDownlink())
    older = exchange.sent("a")
    exchange.state = helpers.moved(exchange.state, 1)
    newer = exchange.sent("a")
    exchange.downlink.acknowledge("a", "model", older.reference)
    assert {older.reference, newer.reference} <= set(exchange.downlink.references)


def test_what_nobody_holds_is_forgotten(helpers):
    exchange = helpers.Exchange(PerClientDownlink())
    for seed in range(12):
        exchange.round("a")
        exchange.round("b", answers=False)
        exchange.state = helpers.moved(exchange.state, seed)
    # a's last one, and of b, which never answered, the last two in flight.
    assert len(exchange.downlink.references) <= 3
    exchange.downlink.acknowledge("a", "model", None)
    exchange.downlink.acknowledge("b", "model", None)
    assert len(exchange.downlink.references) == 0


def test_the_grid_keeps_so_many_versions(helpers):
    exchange = helpers.Exchange(helpers.SCHEMES["grid"](versions=3))
    exchange.round("away")
    for seed in range(6):
        exchange.state = helpers.moved(exchange.state, seed)
        exchange.round("a")
    assert len(exchange.downlink.references) == 3
    # What the away client holds is no longer kept; the whole way from version 0 still is coded.
    assert [message.kind for message in exchange.round("away")[0]] == ["first"]


@pytest.mark.parametrize(
    ("codec", "options", "coarseness"),
    [
        ("small", {}, 2.0),
        ("tiny", {}, 4.0),
        ("int8", {}, 0.05),
        ("small", {"coarseness": 0.5}, 0.5),
    ],
)
def test_steps_are_those_of_the_codec_or_the_stated_ones(helpers, codec, options, coarseness):
    exchange = helpers.Exchange(helpers.SCHEMES["grid"](**options), codec=codec)
    exchange.round("a")
    exchange.state = helpers.moved(exchange.state, 1, size=0.01)
    _, received = exchange.round("a")
    error = received.tensors["0.x1"] - exchange.state["0.x1"]
    # The nearest power of two is within a factor of the root of 2; half a step is the error.
    assert 0.7 < float(error.abs().max()) / (0.01 * coarseness / 2) < 1.45


def test_without_a_memory_of_clients_the_caller_says_what_is_held(helpers):
    exchange = helpers.Exchange(helpers.SCHEMES["grid"](remember=False))
    _, received = exchange.round("a")
    exchange.state = helpers.moved(exchange.state, 1)
    assert exchange.sent("a").kind == "first"
    assert exchange.sent("a", holds=received.reference).kind == "update"
    assert exchange.sent("a", holds="").kind == "full"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_and_integers(exchange, helpers, dtype):
    exchange.state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in exchange.state.items()
    }
    for seed in range(4):
        exchange.state = helpers.moved(exchange.state, seed)
        messages, received = exchange.round("a")
        assert len(messages) == 1
        for name, value in exchange.state.items():
            assert received.tensors[name].dtype == value.dtype
            if not value.is_floating_point():
                assert torch.equal(received.tensors[name], value)


@pytest.mark.parametrize("codec", ["none", "lossless", "zlib", "cast:to=bf16+zlib"])
def test_codecs_without_a_reference_are_sent_as_they_are(scheme, helpers, codec):
    exchange = helpers.Exchange(scheme(), codec=codec)
    for seed in range(3):
        (message,), received = exchange.round("a")
        assert message.kind == "plain"
        assert message.payload == exchange.round("b")[0][0].payload
        if parse_codec(codec).lossless:
            assert helpers.identical(received.tensors, exchange.state)
        exchange.state = helpers.moved(exchange.state, seed)


def test_a_dense_model_goes_the_same_way(scheme, helpers):
    torch.manual_seed(0)
    exchange = helpers.Exchange(scheme(), model=nn.Sequential(nn.Linear(30, 20)))
    for seed in range(3):
        assert len(exchange.round("a")[0]) == 1
        exchange.state = helpers.moved(exchange.state, seed)


def test_private_factors_never_travel(scheme, helpers):
    net = nn.Sequential(nn.Linear(64, 64))
    fedpara.convert(net, method="pfedpara", gamma=0.1, init="seeded")
    exchange = helpers.Exchange(scheme(), model=net)
    for seed in range(2):
        (_,), received = exchange.round("a")
        assert set(received.tensors) == {"0.x1", "0.y1", "0.bias"}
        exchange.state = helpers.moved(exchange.state, seed)


def test_a_part_of_a_model_is_a_record_of_its_own(scheme, helpers):
    exchange = helpers.Exchange(scheme())
    whole = exchange.state
    exchange.state = {name: value for name, value in whole.items() if not name.endswith("bias")}
    (message,), _ = exchange.round("a")
    assert message.kind == "first"


def test_a_model_that_changes_its_shapes_starts_anew(exchange, helpers):
    exchange.round("a")
    exchange.state = {**exchange.state, "2.bias": torch.ones(7)}
    (message,), received = exchange.round("a")
    assert message.kind == "first"
    assert received.tensors["2.bias"].shape == (7,)


def test_the_entropy_coder_is_one_that_the_client_has(scheme, helpers):
    exchange = helpers.Exchange(scheme(), decoders=None)
    exchange.round("a")
    exchange.state = helpers.moved(exchange.state, 1)
    assert peek_header(exchange.round("a")[0][0].payload).codec.endswith("+zlib")


def test_the_callers_own_words_stand_in_the_header(exchange, helpers):
    header = peek_header(exchange.sent("a", extra={"round": 3}).payload)
    assert (header.extra["round"], header.model["seed"]) == (3, 0)
    assert peek_header(exchange.sent("a", extra={"round": 4}).payload).extra["round"] == 4


def test_damaged_bytes_and_too_many_are_refused(exchange):
    message = exchange.sent("a")
    client = exchange.client("a")
    with pytest.raises(PayloadError):
        client.receive("model", message.payload[:-1], limit=10**7)
    with pytest.raises(PayloadError, match="limit"):
        client.receive("model", message.payload, limit=100)
    assert client.holds("model") == ()


def test_a_client_whose_own_storage_is_damaged_says_so(exchange, helpers):
    exchange.round("a")
    storage = exchange.clients["a"]._storage
    storage["model/last"] = storage["model/last"][:-1]
    exchange.state = helpers.moved(exchange.state, 1)
    assert [message.kind for message in exchange.round("a")[0]] == ["update", "full"]


def test_a_refusal_that_names_what_is_known_is_answered_with_an_update(exchange, helpers):
    _, received = exchange.round("a")
    exchange.state = helpers.moved(exchange.state, 1)
    exchange.round("b")
    exchange.downlink.refused("b", "model", ["0" * 64, received.reference])
    assert exchange.sent("b").kind == "update"


def test_a_client_holds_two_states_at_most(exchange, helpers):
    for seed in range(4):
        _, received = exchange.round("a")
        assert exchange.clients["a"].holds("model")[0] == received.reference
        assert received.reference == reference_hash(received.tensors)
        assert len(exchange.clients["a"].holds("model")) <= 2
        exchange.state = helpers.moved(exchange.state, seed)
    exchange.clients["a"].forget("model")
    assert exchange.clients["a"].holds("model") == ()


def test_the_counts_are_those_of_the_messages(exchange, helpers):
    exchange.round("a")
    exchange.round("a")
    exchange.state = helpers.moved(exchange.state, 1)
    exchange.round("a")
    assert exchange.downlink.counts == {"first": 1, "repeat": 1, "update": 1}


def test_memory_of_payloads_is_bounded(helpers):
    exchange = helpers.Exchange(PerClientDownlink())
    for seed in range(per_client_module.REMEMBERED + 3):
        exchange.round(str(seed))
        exchange.state = helpers.moved(exchange.state, seed)
    for seed in range(per_client_module.REMEMBERED + 3):
        exchange.round(str(seed))
    assert len(exchange.downlink._encoded) <= per_client_module.REMEMBERED


@pytest.mark.parametrize("codec", ["small", "balanced", "int8"])
def test_a_mask_in_the_model_arrives_and_changes_nothing_for_others(scheme, helpers, codec):
    """The first message is coded against version 0 as ever, the next ones are updates."""
    mask = torch.full((12, 12), -float("inf")).triu(1)
    kinds, sizes = [], []
    for own in ({}, {"mask": mask}):
        model = helpers.small_model()
        for name, value in own.items():
            model.register_buffer(name, value)
        exchange = helpers.Exchange(scheme(), model=model, codec=codec)
        for number in range(3):
            (message,), received = exchange.round("a")
            kinds.append(message.kind)
            sizes.append(len(message.payload))
            assert own.keys() <= received.tensors.keys()
            for name, value in received.tensors.items():
                assert torch.equal(value, mask) if name in own else torch.isfinite(value).all()
            exchange.state = {**helpers.moved(exchange.state, number), **own}
    assert kinds[:3] == kinds[3:] == ["first", "update", "update"]
    assert all(
        with_mask < without + 400 for without, with_mask in zip(sizes[:3], sizes[3:], strict=True)
    )


def test_a_place_that_is_unmasked_is_published_exactly(scheme, helpers):
    exchange = helpers.Exchange(scheme(), codec="small")
    exchange.state = {**exchange.state, "2.bias": exchange.state["2.bias"].clone()}
    exchange.state["2.bias"][0] = -float("inf")
    exchange.round("a")
    exchange.state = {**exchange.state, "2.bias": exchange.state["2.bias"].clone()}
    exchange.state["2.bias"][0] = 0.25
    _, received = exchange.round("a")
    assert torch.isfinite(received.tensors["2.bias"]).all()
    assert abs(received.tensors["2.bias"][0] - 0.25) < 0.01
