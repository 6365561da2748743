"""A client's reply at the server, one record after the other."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins import MismatchError, ModelSpec, PayloadError
from fedpara_plugins.codecs import encode_payload, parse_codec
from fedpara_plugins.exchange import DownlinkEncoder, plain_spec, reason_of
from fedpara_plugins.exchange.reply_reader import MOST_FIRST

NONE = parse_codec("none")


def payload_of(tensors, **options):
    return encode_payload(tensors, codec=NONE, **options)


@pytest.fixture
def pair(helpers):
    return helpers.Pair(codec="lossless")


def test_a_reply_is_completed_by_what_the_server_has(pair, helpers):
    sent = helpers.moved(pair.shared)
    read = pair.reader().read("model", payload_of(sent))
    assert read.shared.keys() == pair.shared.keys()
    assert tuple(read.state) == pair.spec.keys
    for name, value in read.state.items():
        assert torch.equal(value, sent.get(name, pair.state[name])), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {**s, "2.bias": torch.zeros(4)}, r"'2.bias' of shape \(4,\), this server sent"),
        (lambda s: {k: v for k, v in s.items() if k != "2.bias"}, r"other names .*'2.bias'"),
        (lambda s: {**s, "more": torch.zeros(1)}, r"other names .*'more'"),
        (lambda s: {**s, "0.x2": torch.zeros(40, 9)}, r"other names .*'0.x2'.* private names stay"),
        (lambda s: {}, "other names"),
    ],
)
def test_names_and_shapes_are_those_that_were_sent(pair, change, words):
    with pytest.raises(MismatchError, match=words):
        pair.reader().read("model", payload_of(change(pair.shared)))


def test_a_private_name_is_no_shared_one(pair):
    with pytest.raises(MismatchError, match=r"other names .*'0.x2'"):
        pair.reader().read("model", payload_of(pair.state))


def test_a_part_of_the_names_can_be_left_to_the_strategy(pair):
    part = {"2.bias": torch.ones(5)}
    read = pair.reader(strict=False).read("model", payload_of(part))
    assert set(read.state) == set(part)
    for wrong, words in (
        ({**part, "more": torch.zeros(1)}, "'more'"),
        ({"2.bias": torch.ones(4)}, r"shape \(4,\)"),
        ({**part, "0.x2": pair.state["0.x2"]}, "'0.x2'.* private names stay"),
        ({}, "other names"),
    ):
        with pytest.raises(MismatchError, match=words):
            pair.reader(strict=False).read("model", payload_of(wrong))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_and_counted(pair, value):
    bad = {**pair.shared, "2.bias": torch.full((5,), value)}
    reader = pair.reader()
    with pytest.raises(PayloadError, match=r"'2.bias' holds 5 NaN or infinite"):
        reader.read("model", payload_of(bad))
    assert reader.size.tensors == len(pair.shared)


def test_one_damaged_reply_is_nobody_elses(pair):
    sound = payload_of(pair.shared)
    damaged = sound[:-1] + bytes([sound[-1] ^ 1])
    reader = pair.reader()
    with pytest.raises(PayloadError, match="checksum"):
        reader.read("model", damaged)
    assert reader.size.tensors == 0
    assert pair.reader().read("model", sound).state.keys() == pair.state.keys()


def test_a_reply_may_have_two_models_and_four_mib_with_all_its_records(pair):
    most = 2 * sum(v.numel() * v.element_size() for v in pair.state.values()) + 4 * 2**20
    with pytest.raises(PayloadError, match="limit"):
        pair.reader().read("model", payload_of({"2.bias": torch.zeros(most // 4 + 1)}))
    with pytest.raises(PayloadError, match="limit"):
        pair.reader().read("unknown", payload_of({"a": torch.zeros(most // 4 + 1)}))
    half = payload_of({"a": torch.zeros(most // 8)})
    reader = pair.reader()
    reader.read_all({"one": half, "two": half})
    assert reader.budget.left < 4
    with pytest.raises(PayloadError, match="limit"):
        reader.read("three", payload_of({"a": torch.zeros(2)}))


def test_a_reply_may_have_four_records_more_than_the_message(pair):
    small = payload_of({"a": torch.zeros(1)})
    pair.reader().read_all({f"r{n}": small for n in range(5)})
    with pytest.raises(PayloadError, match="holds 6 records"):
        pair.reader().read_all({f"r{n}": small for n in range(6)})


def test_a_delta_is_read_against_what_the_client_received(helpers):
    pair = helpers.Pair(codec="delta+zlib")
    client_round = pair.received()
    after = helpers.moved(client_round.received["model"].user_tensors)
    payload = client_round.encode(client_round.prepare_reply({"model": after}))["model"]
    # Meanwhile the server has put the next round's model; the old one is still known by its hash.
    pair.encoder.put("model", helpers.moved(pair.state, 9), pair.spec)
    read = pair.reader().read("model", payload).shared
    assert all(torch.equal(read[key], after[key]) for key in read)
    stranger = helpers.Pair(codec="delta+zlib")
    with pytest.raises(PayloadError, match="reference"):
        stranger.reader().read("model", payload)


def test_sizes_are_those_of_the_shared_part_and_of_the_dense_model(pair):
    reader = pair.reader()
    reader.read("model", payload_of(pair.shared))
    raw = sum(v.numel() * v.element_size() for v in pair.shared.values())
    dense = pair.spec.dense_state(pair.state)
    assert (reader.size.tensors, reader.size.raw) == (len(pair.shared), raw)
    assert reader.size.dense == sum(v.numel() * v.element_size() for v in dense.values())
    # An optimizer's tensors stand for as much of the dense model as the factors they belong to.
    reader = pair.reader(asked={"change"})
    reader.read("change", payload_of({k: pair.shared[k] for k in ("0.x1", "0.y1")}))
    assert reader.size.dense == 4 * 48 * 40
    plain = pair.reader(model_of=lambda tensors: None, asked={"change"})
    plain.read("change", payload_of({"0.x1": pair.shared["0.x1"]}))
    assert plain.size.dense == plain.size.raw


def test_private_values_in_a_reply_are_not_counted(pair):
    reader = pair.reader(strict=False)
    with pytest.raises(MismatchError):
        reader.read("model", payload_of(pair.state))
    assert reader.size.tensors == len(pair.shared)


def test_a_side_record_has_to_be_asked_for_and_has_names_and_shapes_of_the_model(pair):
    part = {"2.bias": torch.ones(5)}
    reader = pair.reader(asked={"change"})
    assert set(reader.read("change", payload_of(part)).state) == {"2.bias"}
    for record, tensors, words in (
        ("variate", part, "record 'variate' unasked"),
        ("change", {"2.bias": torch.ones(9)}, r"shape \(9,\)"),
        ("change", {"more": torch.ones(1)}, "'more', which is no shared name"),
        ("change", {"0.x2": pair.state["0.x2"]}, "'0.x2', which is no shared name"),
        ("change", {"2.bias": torch.ones(5, dtype=torch.complex64)}, "complex64"),
        ("change", {"2.bias": torch.ones(5, dtype=torch.int64)}, "int64"),
        ("change", {"2.bias": torch.full((5,), 1e300, dtype=torch.float64)}, "infinite"),
        ("change", {"2.bias": torch.full((5,), float("nan"))}, "NaN"),
    ):
        with pytest.raises(PayloadError, match=words):
            reader.read(record, payload_of(tensors))


def test_a_record_of_an_apps_own_is_finite_bounded_and_holds_nothing_private(pair):
    own = {"counts": torch.arange(4), "noise": torch.randn(3, dtype=torch.complex64)}
    assert set(pair.reader().read("own", payload_of(own)).state) == set(own)
    for tensors, words in (
        ({"a": torch.tensor([1.0, float("inf")])}, "NaN or infinite"),
        ({"a": torch.tensor([complex(0, float("nan"))])}, "NaN or infinite"),
        ({"a": torch.tensor([float("nan")]).to(torch.float8_e5m2)}, "NaN or infinite"),
        ({f"t{n}": torch.zeros(1) for n in range(300)}, "holds 300 tensors"),
        ({"0.x2": pair.state["0.x2"]}, "'0.x2', which is private"),
    ):
        with pytest.raises(PayloadError, match=words):
            pair.reader().read("own", payload_of(tensors))
    with pytest.raises(MismatchError, match="'own' unasked"):
        pair.reader(own=False).read("own", payload_of(own))


def test_a_client_names_what_it_has_received_by_hash(helpers):
    pair = helpers.Pair(codec="int8")
    client_round = pair.received()
    held = client_round.received_hashes["model"]
    assert pair.reader().received("model", held).keys() == pair.shared.keys()
    assert pair.reader().received("model", "0" * 64) is None
    pair.encoder.put("variate", {"2.bias": torch.ones(5)}, plain_spec(["2.bias"]))
    pair.encoder.encode("7", "variate")
    strange = next(h for h in pair.encoder.references if h != held)
    with pytest.raises(MismatchError, match="none of the record 'model'"):
        pair.reader().received("model", strange)


def test_the_first_weights_are_of_so_many_tensors_at_most(pair):
    """Each costs time, however small, and nothing has been sent that says how many to expect."""
    pair.encoder = DownlinkEncoder(pair.settings)
    many = {f"{i}": torch.ones(1) for i in range(MOST_FIRST + 4)}
    with pytest.raises(PayloadError, match="holds 4100 tensors, this side expects at most 4096"):
        pair.reader().read_first("parameters", payload_of(many, model=pair.spec.to_json()))
    described = {**pair.spec.to_json(), "private": [f"{i}" for i in range(MOST_FIRST + 4)]}
    with pytest.raises(PayloadError, match="describes 4100 'private' of a model"):
        pair.reader().read_first("parameters", payload_of(pair.shared, model=described))


def test_the_first_weights_bring_their_own_description(pair, helpers):
    pair.encoder = DownlinkEncoder(pair.settings)
    payload = payload_of(pair.shared, model=pair.spec.to_json())
    reader = pair.reader()
    spec, shared = reader.read_first("parameters", payload)
    spec.check_equal(pair.spec, here="the server", there="the client")
    assert spec.keys == pair.spec.keys
    assert shared.keys() == pair.shared.keys()
    assert reader.size.tensors == len(shared)
    with pytest.raises(PayloadError, match="describes no model"):
        reader.read_first("parameters", payload_of(pair.shared))
    forged = {**pair.spec.to_json(), "fingerprint": "0" * 16}
    with pytest.raises(PayloadError, match="fingerprint"):
        reader.read_first("parameters", payload_of(pair.shared, model=forged))
    diverged = {**pair.shared, "2.bias": torch.full((5,), float("nan"))}
    with pytest.raises(PayloadError, match="NaN"):
        reader.read_first("parameters", payload_of(diverged, model=pair.spec.to_json()))
    masked = {**pair.shared, "2.bias": torch.full((5,), -float("inf"))}  # the model's own
    reader.read_first("parameters", payload_of(masked, model=pair.spec.to_json()))
    for value in (float("inf"), float("nan")):
        factor = {**pair.shared, "0.x1": torch.full_like(pair.shared["0.x1"], value)}
        with pytest.raises(PayloadError):
            reader.read_first("parameters", payload_of(factor, model=pair.spec.to_json()))
    absurd = {**pair.shared, "0.x1": torch.full_like(pair.shared["0.x1"], 1e38)}
    with pytest.raises(PayloadError, match=r"'0\.weight' are too large"):
        reader.read_first("parameters", payload_of(absurd, model=pair.spec.to_json()))
    short = {**pair.shared, "0.x1": pair.shared["0.x1"][1:]}
    with pytest.raises(PayloadError, match="do not fit their own description"):
        reader.read_first("parameters", payload_of(short, model=pair.spec.to_json()))


def test_a_model_without_a_private_part_is_itself(helpers):
    pair = helpers.Pair("fedpara")
    assert isinstance(pair.spec, ModelSpec)
    assert tuple(pair.reader().read("model", payload_of(pair.state)).state) == pair.spec.keys


@pytest.mark.parametrize(
    "error", [KeyError("x"), MemoryError(), RecursionError("deep"), ValueError("a\nb" * 5000)]
)
def test_whatever_is_raised_becomes_the_replys_own_reason(error):
    reason = reason_of(error)
    assert isinstance(reason, PayloadError)
    assert type(error).__name__ in str(reason)
    assert str(reason).isprintable()
    assert len(str(reason)) < 500
    assert reason_of(reason) is reason
