"""One message at one client, from its payloads to those of the answer."""

from __future__ import annotations

import math

import pytest
import torch

from fedpara_plugins import ConfigError, MismatchError, ModelSpec, PayloadError, TooLargeError
from fedpara_plugins.codecs import (
    LostDescriptionError,
    decode_payload,
    encode_payload,
    parse_codec,
    peek_header,
)
from fedpara_plugins.exchange import ClientRound, ClientState, DownlinkEncoder, OwnModels
from fedpara_plugins.exchange.outgoing import Outgoing
from fedpara_plugins.exchange.records import plain_spec
from fedpara_plugins.references import LostReferenceError


def answered(client_round, helpers, **options):
    """The payloads of an answer after some training, and the state that was trained."""
    after = helpers.moved(client_round.received["model"].user_tensors)
    return client_round.encode(client_round.prepare_reply({"model": after}), **options), after


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_what_a_client_answers_is_what_the_server_reads(helpers, method, codec):
    pair = helpers.Pair(method, codec=codec)
    client_round = pair.received()
    given = client_round.received["model"].user_tensors
    assert tuple(given) == pair.spec.keys
    assert all(torch.equal(given[key], value) for key, value in pair.shared.items())
    payloads, after = answered(client_round, helpers)
    read = pair.reader().read("model", payloads["model"])
    assert set(read.shared) == set(pair.spec.shared_keys)
    assert all(torch.equal(read.shared[key], after[key]) for key in read.shared)
    assert tuple(read.state) == pair.spec.keys
    assert all(torch.equal(read.state[key], pair.state[key]) for key in pair.spec.private_keys)


def test_private_values_stay_and_come_back(helpers):
    pair = helpers.Pair(private="3.*")
    first = pair.received()
    assert first.fresh
    payloads, after = answered(first, helpers)
    sent = decode_payload(
        payloads["model"], limit=10**6, descriptions=pair.encoder.descriptions
    ).tensors
    assert not set(sent) & pair.spec.private_keys
    first.keep()
    second = pair.received()
    assert not second.fresh
    given = second.received["model"].user_tensors
    assert all(torch.equal(given[key], after[key]) for key in pair.spec.private_keys)
    assert pair.spec.private_keys >= {"3.weight", "3.running_mean", "0.x2"}


def test_damaged_private_state_is_named_and_begins_anew(helpers, caplog):
    pair = helpers.Pair()
    first = pair.received()
    answered(first, helpers)
    first.keep()
    (key,) = [key for key in pair.storage if key.startswith("private/")]
    pair.storage[key] = pair.storage[key][:-1] + b"?"
    assert pair.received().fresh
    assert "client 7: its private state in its storage is damaged" in caplog.text


def test_nothing_is_kept_before_the_end(helpers):
    pair = helpers.Pair(codec="small")
    client_round = pair.received()
    answered(client_round, helpers)
    assert pair.storage == {}
    client_round.keep(steps=3)
    assert {key.partition("/")[0] for key in pair.storage} == {
        "private", "reference", "residual", "steps",
    }  # fmt: skip
    assert pair.round().previous_steps == 3


def test_both_directions_go_on_from_what_was_received(helpers):
    pair = helpers.Pair(codec="small")
    first = pair.received()
    first.keep()
    pair.encoder.acknowledge("7", first.received_hashes, ())
    pair.encoder.put("model", helpers.moved(pair.state, 5), pair.spec)
    payloads = pair.payloads()
    assert peek_header(payloads["model"]).reference == first.received_hashes["model"]
    second = pair.round()
    second.receive(payloads)
    answer, after = answered(second, helpers)
    assert peek_header(answer["model"]).reference == second.received_hashes["model"]
    read = pair.reader().read("model", answer["model"]).shared
    assert (read["0.x1"] - after["0.x1"]).abs().max() < 0.1


def test_a_client_that_lost_what_a_message_was_coded_against_says_what_it_holds(helpers):
    pair = helpers.Pair(codec="small")
    pair.encoder.put("variate", pair.shared, ModelSpec({}, tuple(pair.shared), seed=0))
    first = pair.round()
    first.receive(pair.payloads("model", "variate"))
    first.keep()
    pair.encoder.acknowledge("7", first.received_hashes, ())
    pair.encoder.put("model", helpers.moved(pair.state, 5), pair.spec)
    lost = [key for key in pair.storage if key.startswith("reference/model")]
    for key in lost:
        del pair.storage[key]
    second = pair.round()
    with pytest.raises(LostReferenceError):
        second.receive(pair.payloads("model", "variate"))
    assert second.known_hashes() == {"model": (), "variate": (first.received_hashes["variate"],)}


def test_another_codec_is_refused_with_the_adapters_remedy(helpers):
    pair = helpers.Pair(codec="lossless")
    payloads = pair.payloads()
    pair.settings = helpers.settings_of(codec="int8")
    remedy = "Set it here"
    with pytest.raises(ConfigError, match=r"this client has int8, the server has lossless\. Set i"):
        pair.round(remedy=remedy).receive(payloads)
    with pytest.raises(ConfigError, match="Set the same fedpara option codec on both sides"):
        pair.round().receive(payloads)


def test_codecs_are_compared_at_the_first_message_alone(helpers):
    pair = helpers.Pair("fedpara", codec="lossless")
    pair.encoder.acknowledge("7", {}, ("zlib",))
    payloads = pair.payloads()
    pair.settings = helpers.settings_of(codec="int8")
    assert pair.round().receive(payloads)["model"].user_tensors.keys() == pair.state.keys()


def test_another_model_than_the_clients_own_is_refused(helpers):
    pair = helpers.Pair()
    other = ModelSpec.of(helpers.converted("fedpara"))
    with pytest.raises(MismatchError, match="this client"):
        pair.received(own=pair.own(other))
    assert pair.received().received["model"].spec is pair.spec


def test_without_the_clients_model_the_options_are_compared(helpers):
    pair = helpers.Pair("fedpara", local="dense")
    pair.settings = helpers.settings_of(method="lowrank", local="dense")
    with pytest.raises(MismatchError, match="the server's model has method fedpara"):
        pair.received(own=OwnModels(pair.settings.config))


def test_dense_training_is_projected_and_checked(helpers):
    pair = helpers.Pair(local="dense")
    client_round = pair.received()
    given = client_round.received["model"].user_tensors
    assert set(given) == set(pair.spec.dense_state(pair.state))
    leaving = client_round.prepare_reply({"model": helpers.moved(given)})["model"]
    assert set(leaving.shared) == set(pair.spec.shared_keys)
    assert not torch.equal(leaving.shared["0.x1"], pair.state["0.x1"])
    client_round.keep()
    private, first = pair.kept()
    assert not first
    assert private["0.x2"].shape == pair.state["0.x2"].shape


def test_a_projection_that_overflows_is_refused(helpers):
    client_round = helpers.Pair(local="dense").received()
    given = client_round.received["model"].user_tensors
    huge = {**given, "0.weight": torch.full_like(given["0.weight"], 3e38)}
    with pytest.raises(PayloadError, match=r"'0\.[xy][12]' holds \d+ NaN or infinite"):
        client_round.prepare_reply({"model": huge})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {**s, "2.bias": s["2.bias"] * float("nan")}, "'2.bias' holds 5 NaN"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "model.module.state_dict"),
        (lambda s: {**s, "extra": torch.ones(1)}, "'extra', which the model does not have"),
    ],
)
def test_an_answer_that_cannot_be_sent_is_refused(helpers, change, words):
    client_round = helpers.Pair().received()
    with pytest.raises(PayloadError, match=words):
        client_round.prepare_reply({"model": change(client_round.received["model"].user_tensors)})


def test_a_side_record_is_what_came_whatever_model_it_describes(helpers):
    pair = helpers.Pair()
    pair.encoder.put("variate", pair.state, pair.spec)
    client_round = pair.round()
    received = client_round.receive(pair.payloads("variate"))["variate"]
    assert received.user_tensors.keys() == pair.shared.keys()
    assert not received.spec.private_keys
    assert not client_round.fresh
    assert client_round.models == []


@pytest.mark.parametrize("record", ["variate", "change"])
def test_side_records_hold_nothing_private(helpers, record):
    pair = helpers.Pair()
    client_round = pair.received()
    given = client_round.received["model"].user_tensors
    leaving = client_round.prepare_reply({record: pair.shared})[record]
    assert leaving.shared.keys() == pair.shared.keys()
    with pytest.raises(PayloadError, match=r"'0.[xy]2', which stays on the device"):
        client_round.prepare_reply({record: given})


def test_a_further_model_record_leaves_its_private_values_out(helpers):
    pair = helpers.Pair()
    client_round = pair.received()
    given = client_round.received["model"].user_tensors
    leaving = client_round.prepare_reply({"copy": {**given, "note": torch.ones(2)}})["copy"]
    assert set(leaving.shared) == {*pair.spec.shared_keys, "note"}
    client_round.keep()
    assert pair.kept()[1], "only the record that was asked for is kept"


def test_a_model_has_one_private_state_however_many_records_hold_it(helpers):
    pair = helpers.Pair()
    pair.encoder.put("teacher", pair.state, pair.spec)
    client_round = pair.round()
    received = client_round.receive(pair.payloads("model", "teacher"))
    given = received["model"].user_tensors
    client_round.prepare_reply({"model": given, "teacher": dict(given)})
    with pytest.raises(PayloadError, match=r"records 'model' and 'teacher'.*differ in '0.x2'"):
        client_round.prepare_reply({"model": given, "teacher": helpers.moved(given)})
    part = {**pair.shared, "0.x2": given["0.x2"]}
    with pytest.raises(PayloadError, match="are of one model, and their private values differ:"):
        client_round.prepare_reply({"model": given, "teacher": part})


def test_the_codecs_loss_is_told_and_made_up_for(helpers):
    pair = helpers.Pair("fedpara", codec="delta+feedback+int8+zlib")
    told = []
    first = pair.received()
    payloads, after = answered(first, helpers, on_encoded=told.append)
    first.keep()
    read = pair.reader().read("model", payloads["model"]).shared
    lost = {key: after[key] - read[key] for key in read if after[key].is_floating_point()}
    assert any(value.any() for value in lost.values())
    for key, value in lost.items():
        assert torch.allclose(told[0]["model"].get(key, torch.zeros(())), value, atol=1e-6), key
    kept = ClientState(pair.storage, "7").residual("model")
    assert kept.keys() == told[0]["model"].keys()
    # The next answer sends it too: what it loses is told without what was lost before.
    second = pair.received()
    payloads, again = answered(second, helpers, on_encoded=told.append)
    read = pair.reader().read("model", payloads["model"]).shared
    for key in lost:
        wanted = again[key] - read[key]
        assert torch.allclose(told[1]["model"].get(key, torch.zeros(())), wanted, atol=1e-6), key
    second.keep()
    later = ClientState(pair.storage, "7").residual("model")
    for key, value in later.items():
        rest = kept.get(key, torch.zeros(())) + told[1]["model"][key]
        assert torch.allclose(value, rest, atol=1e-6), key


def test_the_loss_of_an_update_is_told_and_not_kept(helpers):
    pair = helpers.Pair("fedpara", codec="small")
    client_round = pair.received()
    change = {key: 1e-3 * value for key, value in pair.shared.items() if value.is_floating_point()}
    told = []
    leaving = client_round.prepare_reply({"change": change})
    payload = client_round.encode(leaving, on_encoded=told.append)["change"]
    assert "delta" not in peek_header(payload).codec
    back = decode_payload(payload, limit=10**6, descriptions=pair.encoder.descriptions).tensors
    assert any(not torch.equal(back[key], change[key]) for key in change)
    for key, value in change.items():
        lost = told[0]["change"].get(key, torch.zeros(()))
        assert torch.allclose(lost, value - back[key], atol=1e-7), key
    client_round.keep()
    assert ClientState(pair.storage, "7").residual("change") is None


def test_shared_values_can_leave_uncoded(helpers):
    """Secure aggregation: the adapter takes the numbers, and nothing is encoded."""
    pair = helpers.Pair()
    client_round = pair.received()
    after = helpers.moved(client_round.received["model"].user_tensors)
    leaving = client_round.prepare_reply({"model": after})
    told = []
    assert client_round.encode({}, on_encoded=told.append) == {}
    assert told == [{}]
    assert set(leaving["model"].shared) == set(pair.spec.shared_keys)
    client_round.keep()
    private, first = pair.kept()
    assert not first
    assert all(torch.equal(private[key], after[key]) for key in private)


def test_an_answer_to_no_model_is_split_by_what_the_client_has_built(helpers):
    pair = helpers.Pair(private="3.*")
    client_round = pair.round()
    client_round.receive({})
    leaving = client_round.prepare_reply({"parameters": pair.state})["parameters"]
    assert set(leaving.shared) == set(pair.spec.shared_keys)
    payload = client_round.encode({"parameters": leaving})["parameters"]
    spec, shared = pair.reader().read_first("parameters", payload)
    spec.check_equal(pair.spec, here="server", there="client")
    assert set(shared) == set(pair.spec.shared_keys)
    client_round.keep()
    assert pair.storage == {}


def test_models_that_the_clients_code_built_are_remembered_with_their_options(helpers):
    pair = helpers.Pair()
    own = OwnModels(pair.settings.config)
    first = pair.round(own=own)
    first.receive(pair.payloads())
    own.add(pair.spec, 5000)  # the app builds its model after the message was decoded
    answered(first, helpers)
    first.keep()
    state = ClientState(pair.storage, "7")
    (model,) = state.own_models(pair.settings.config)
    assert model.spec.fingerprint == pair.spec.fingerprint
    assert model.nbytes == 5000
    assert state.own_models(helpers.settings_of(method="pfedpara", gamma=0.5).config) == []
    pair.storage["own/" + pair.spec.fingerprint] = b"{}"
    assert state.own_models(pair.settings.config) == []


def test_a_message_that_describes_another_split_is_refused_from_the_second_round_on(helpers):
    pair = helpers.Pair(private="3.*")
    own = OwnModels(pair.settings.config)
    first = pair.round(own=own)
    first.receive(pair.payloads())
    own.add(pair.spec, 5000)
    answered(first, helpers)
    first.keep()
    plain = plain_spec(pair.state)
    pair.encoder.put("second", pair.state, plain)
    known = OwnModels(pair.settings.config, ClientState(pair.storage).own_models(own._config))
    for records in (("model", "second"), ("second",)):
        with pytest.raises(MismatchError):
            pair.round(own=known).receive(pair.payloads(*records))


@pytest.mark.parametrize("options", [{"method": "fedpara"}, {"method": "none"}])
def test_private_state_is_never_shared_by_other_options(helpers, options):
    pair = helpers.Pair()
    first = pair.received()
    answered(first, helpers)
    first.keep()
    model = helpers.converted(**{"method": "pfedpara", **options})
    pair.settings = helpers.settings_of(**{"method": "pfedpara", "gamma": 0.3, **options})
    pair.spec, pair.state = ModelSpec.of(model), model.state_dict()
    pair.encoder.put("model", pair.state, pair.spec)
    with pytest.raises(ConfigError, match=r"holds private state of this model \('0\.x2', in"):
        pair.received()
    # It may be split otherwise, as long as the layer keeps a private half.
    model = helpers.converted(tanh=True)
    pair.settings = helpers.settings_of(method="pfedpara", gamma=0.3, tanh=True)
    pair.spec, pair.state = ModelSpec.of(model), model.state_dict()
    pair.encoder.put("model", pair.state, pair.spec)
    assert pair.received().fresh


def test_a_message_of_more_bytes_than_the_clients_model_allows(helpers):
    pair = helpers.Pair("fedpara")
    many = {name: torch.zeros(2**19) for name in "abc"}  # 6 MiB
    pair.encoder.put("extra", many, plain_spec(many))
    for name in "cd":
        pair.encoder.put(name, {"a": torch.zeros(2**19)}, plain_spec("a"))  # 2 MiB each
    with pytest.raises(TooLargeError):
        pair.round().receive(pair.payloads("model", "extra"))
    with pytest.raises(TooLargeError):
        pair.round().receive(pair.payloads("extra", "c", "d"))
    with pytest.raises(PayloadError, match="65 records of arrays, expected at most 64"):
        pair.round().receive(dict.fromkeys(map(str, range(65)), b""))


def test_the_uplink_uses_the_coders_that_the_server_has(helpers, monkeypatch):
    pair = helpers.Pair("fedpara", codec="small")
    monkeypatch.setattr("fedpara_plugins.exchange.headers.readable", lambda: ("zlib",))
    payloads = pair.payloads()
    monkeypatch.undo()
    client_round = pair.round()
    client_round.receive(payloads)
    coded, _ = answered(client_round, helpers)
    assert peek_header(coded["model"]).codec.endswith("+zlib")
    assert not peek_header(answered(pair.received(), helpers)[0]["model"]).codec.endswith("+zlib")


def test_only_what_was_decided_on_is_encoded(helpers):
    """What is encoded comes from `outgoing`, whatever tensors came in or were answered."""
    pair = helpers.Pair()
    client_round = pair.received()
    payloads = client_round.encode({"model": Outgoing(pair.spec, {"2.bias": torch.ones(5)})})
    back = decode_payload(payloads["model"], limit=10**6, descriptions=pair.encoder.descriptions)
    assert set(back.tensors) == {"2.bias"}


def test_first_weights_may_hold_a_mask_and_no_nan(helpers):
    """The client was sent no model: infinities are the model's own, NaN never is."""
    pair = helpers.Pair()
    for value, said in ((-math.inf, None), (math.nan, "'2.bias' holds 5 NaN")):
        first = {**pair.state, "2.bias": torch.full((5,), value)}
        client_round = pair.round()
        if said is None:
            assert client_round.prepare_reply({"model": first})
            continue
        with pytest.raises(PayloadError, match=said):
            client_round.prepare_reply({"model": first})


def test_infinities_that_were_received_are_no_divergence(helpers):
    pair = helpers.Pair(codec="small")
    pair.state["2.bias"][1] = -math.inf
    pair.encoder = DownlinkEncoder(pair.settings)
    pair.encoder.put("model", pair.state, pair.spec)
    client_round = pair.received()
    trained = dict(client_round.received["model"].user_tensors)
    client_round.encode(client_round.prepare_reply({"model": trained}))
    trained["2.bias"] = trained["2.bias"].clone()
    trained["2.bias"][2] = math.inf
    with pytest.raises(PayloadError, match=r"'2.bias' holds 1 NaN or infinite values of 5"):
        client_round.prepare_reply({"model": trained})


def test_records_of_ever_new_names_do_not_fill_a_clients_state(helpers):
    """A server names its records as it likes; an app may answer under the same names."""
    pair = helpers.Pair(codec="small")
    payload = pair.payloads()["model"]
    sizes = []
    for number in range(12):
        names = ["model", *(f"{number}/{place}" for place in range(6))]
        client_round = pair.round()
        client_round.receive(dict.fromkeys(names, payload))
        after = helpers.moved(client_round.received["model"].user_tensors, number)
        client_round.encode(client_round.prepare_reply(dict.fromkeys(names, after)))
        client_round.keep(steps=1)
        sizes.append(sum(map(len, pair.storage.values())))
        held = {key.partition("/")[2] for key in pair.storage if key.startswith("residual/")}
        held |= {k[10:].rpartition("/")[0] for k in pair.storage if k.startswith("reference/")}
        assert held >= set(names)
        assert len(held) <= 16
    assert max(sizes[3:]) <= 1.1 * max(sizes[:3])


def test_records_share_the_bound_of_a_client_without_a_model(helpers):
    """Whatever their number: each of these is below it alone."""
    empty = OwnModels(helpers.settings_of().config)
    pair = helpers.Pair("none", codec="lossless")
    zeros = {"w": torch.zeros(12 * 2**20)}
    payload = encode_payload(
        zeros, codec=parse_codec("lossless").first_contact(), model=plain_spec(zeros).to_json()
    )
    client_round = pair.round(own=empty)
    assert client_round.receive({"a": payload}, unbounded=True)
    with pytest.raises(TooLargeError):
        client_round.receive(dict.fromkeys("abcdefg", payload), unbounded=True)


def test_a_client_without_a_model_takes_few_tensors_until_it_has_one(helpers):
    """Each takes time, however small it is: the message waits until the app has built its model."""
    pair = helpers.Pair()
    many = {f"n{n}": torch.zeros(1) for n in range(300)}
    pair.encoder.put("model", many, plain_spec(many))
    payloads = pair.payloads("model")
    settings, state = helpers.settings_of(method="none", codec="none"), ClientState({})
    client_round = ClientRound(
        settings, state, own=OwnModels(settings.config), kind_of=lambda name: "model"
    )
    with pytest.raises(TooLargeError, match=r"holds \d+ tensors, this side expects at most 256"):
        client_round.receive(payloads)
    assert client_round.receive(payloads, unbounded=True)


@pytest.mark.parametrize("field", ["weights", "private"])
def test_a_description_of_many_rows_is_refused_before_it_is_read(helpers, field):
    """Each takes time, and none needs a tensor in the payload."""
    pair = helpers.Pair()
    model = pair.spec.to_json()
    model[field] = [[f"w{n}", *model[field][0][1:]] for n in range(20_000)]
    payload = encode_payload(pair.shared, codec=parse_codec("none"), model=model)
    with pytest.raises(TooLargeError, match=rf"describes 20000 '{field}' of a model"):
        pair.round().receive({"model": payload})
    with pytest.raises(TooLargeError, match=rf"describes 20000 '{field}'"):
        pair.round().described_plans({"model": payload})


def test_a_description_that_is_lost_is_a_lost_reference(helpers):
    """A client that was started again without its state."""
    pair = helpers.Pair(codec="small")
    first = pair.received()
    first.keep()
    pair.encoder.acknowledge("7", first.received_hashes, first.decoders)
    pair.encoder.put("model", helpers.moved(pair.state, 5), pair.spec)
    payloads = pair.payloads()
    assert len(pair.round().described_plans(payloads)) == 1
    pair.storage.clear()
    again = pair.round()
    with pytest.raises(LostDescriptionError):
        peek_header(payloads["model"], descriptions={})
    with pytest.raises(LostReferenceError):
        again.described_plans(payloads)
    with pytest.raises(LostReferenceError):
        again.receive(payloads)
