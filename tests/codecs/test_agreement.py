"""Two sound sides that disagree: refused before a tensor is decoded, with both sides' values."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ModelSpec
from fedpara_plugins.codecs import (
    Stage,
    decode_payload,
    encode_payload,
    parse_codec,
    reference_hash,
)
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.plugins import stages
from fedpara_plugins.testing.hostile import pack, parts

WIDE = {"widths": (96, 80, 10)}


def model(*, widths=(64, 48, 10), seed=0, **options):
    torch.manual_seed(0)
    first, hidden, last = widths
    net = nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last))
    options = {"method": "pfedpara", "gamma": 0.1, "min_size": 100, "seed": seed, **options}
    return fedpara.convert(net, **options)


def shared(net):
    return {name: value.detach().clone() for name, value in fedpara.split(net).shared.items()}


def sent(net, *, codec="lossless", reference=None, spec=None):
    described = ModelSpec.of(net).to_json() if spec is None else spec
    return encode_payload(
        shared(net), codec=parse_codec(codec), reference=reference, model=described
    )


class Unreached(Stage):
    """Stands for every stage: decoding with it means that the refusal came too late."""

    name = "zlib"
    lossless = True

    def encode(self, tensors, *, reference):
        raise NotImplementedError

    def decode(self, tensors, notes, *, reference, limit):
        pytest.fail("a tensor was decoded before the models were compared")


def receive(data, net, *, decoding=False, **options):
    known = stages() if decoding else {**stages(), "zlib": Unreached()}
    return decode_payload(data, limit=10**6, stages=known, expect=ModelSpec.of(net), **options)


def rewritten(data, change):
    table, header, body = parts(data)
    change(header)
    table["__metadata__"]["fedpara"] = json.dumps(header, separators=(",", ":"))
    return pack(table, body)


def test_equal_models_agree():
    net = model()
    back = receive(sent(net), model(), decoding=True, like=shared(model())).tensors
    assert list(back) == list(shared(net))


@pytest.mark.parametrize(
    ("client", "server", "words"),
    [
        ({"gamma": 0.2, **WIDE}, {"gamma": 0.1, **WIDE}, ["'0.weight'", "rank 11", "rank 10"]),
        ({"method": "fedpara"}, {}, ["'0.weight'", "fedpara rank", "pfedpara rank"]),
        ({"widths": (64, 40, 10)}, {}, ["'0.weight'", "(40, 64)", "(48, 64)"]),
        ({"exclude": ["2"]}, {}, ["'2.weight'", "pfedpara rank", "has dense"]),
        ({}, {"exclude": ["2"]}, ["'2.weight'", "pfedpara rank", "has dense"]),
        ({"speed": 0.5}, {"speed": 0.25}, ["'0.weight'", "scale"]),
        ({"tanh": True}, {}, ["'0.weight'", "tanh"]),
        ({"variance": 0.5}, {"variance": 0.25}, ["'0.weight'", "0.5", "0.25"]),
        ({"seed": 5}, {"seed": 6}, ["seed 5", "seed 6"]),
        ({"private": ["2.bias"]}, {"private": ["0.bias"]}, ["['2.bias']", "['0.bias']"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_another_conversion_or_model_names_both_sides(client, server, words):
    with pytest.raises(MismatchError) as caught:
        receive(sent(model(**client)), model(**server))
    for word in [*words, "this side", "sender"]:
        assert word in str(caught.value)
    here, there = str(caught.value).split("sender", 1)
    assert here.split("this side has")[-1] != there, "the two sides' values read alike"


def test_other_names_around_the_same_factors_name_both_fingerprints():
    mine, other = model(), nn.Sequential(*model(), nn.BatchNorm1d(10))
    data = sent(mine, spec={**ModelSpec.of(mine).to_json(), "fingerprint": "0" * 16})
    with pytest.raises(MismatchError, match="names of the model's state.*" + "0" * 16) as caught:
        receive(data, mine)
    assert ModelSpec.of(mine).fingerprint in str(caught.value)
    assert len(ModelSpec.of(other).keys) != len(ModelSpec.of(mine).keys)


def test_a_payload_without_a_description_is_refused_where_one_is_expected():
    net = model()
    data = encode_payload(shared(net), codec=parse_codec("lossless"))
    with pytest.raises(MismatchError, match="does not describe its model") as caught:
        receive(data, net)
    assert ModelSpec.of(net).fingerprint in str(caught.value)
    assert list(decode_payload(data, limit=10**6).tensors) == list(shared(net))


@pytest.mark.parametrize(
    "change",
    [
        lambda described: described.pop("weights"),
        lambda described: described.pop("seed"),
        lambda described: described.update(weights=3),
        lambda described: described.update(weights=[3]),
        lambda described: described.update(weights=["0.weight"]),
        lambda described: described.update(weights=[["0.weight"]]),
        lambda described: described["weights"][0].__setitem__(2, 7),
        lambda described: described["weights"][0].__setitem__(4, ["x"] * 4),
        lambda described: described.update(own=[1]),
        lambda described: described.update(own=3),
        lambda described: described.update(seed=[10**90]),
        lambda described: described.update(fingerprint={"x": 1}),
        lambda described: described.update(fingerprint=None),
    ],
    ids=range(13),
)
def test_malformed_descriptions_are_refused(change):
    net = model()
    data = rewritten(sent(net), lambda header: change(header["model"]))
    with pytest.raises(PayloadError) as caught:
        receive(data, net)
    assert len(str(caught.value)) < 2000


def renamed(tensors):
    return {("other" if name == "0.bias" else name): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: {**tensors, "0.x1": torch.zeros(3, 5)}, ["'0.x1'", "(48, ", "(3, 5)"]),
        (lambda tensors: {**tensors, "more": torch.zeros(1)}, ["not expected ['more']"]),
        (renamed, ["missing ['0.bias']", "not expected ['other']"]),
        (lambda tensors: dict(reversed(tensors.items())), ["order", "place 0", "'2.bias'"]),
        (lambda tensors: {}, ["sent 0", "'0.x1'"]),
    ],
    ids=["shape", "more", "renamed", "order", "none"],
)
def test_tensors_that_are_not_those_described_are_refused(change, words):
    net = model()
    described = ModelSpec.of(net).to_json()
    data = encode_payload(change(shared(net)), codec=parse_codec("none"), model=described)
    with pytest.raises(MismatchError) as caught:
        receive(data, net, decoding=True)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(47), r"'0.bias': this side has shape \(48,\).* sender has \(47,\)"),
        (torch.zeros(48).double(), r"dtype torch.float32, .* sender has torch.float64"),
    ],
)
def test_what_the_description_leaves_open_is_compared_with_this_sides_tensors(value, said):
    """Shapes of biases and norms, and dtypes, stand in no description."""
    net = model()
    changed = {**shared(net), "0.bias": value}
    data = encode_payload(changed, codec=parse_codec("lossless"), model=ModelSpec.of(net).to_json())
    assert receive(data, net, decoding=True).tensors["0.bias"].shape == value.shape
    with pytest.raises(MismatchError, match=said):
        receive(data, net, decoding=True, like=shared(net))


def test_another_reference_names_both_hashes():
    net = model()
    theirs = shared(net)
    mine = {name: value + 1 for name, value in theirs.items()}
    with pytest.raises(MismatchError) as caught:
        receive(sent(net, codec="int8", reference=theirs), net, reference=mine)
    for tensors in (theirs, mine):
        assert reference_hash(tensors) in str(caught.value)


def test_a_newer_format_names_both_versions():
    data = rewritten(sent(model()), lambda header: header.update(version=2, plugin="9.9"))
    with pytest.raises(
        MismatchError, match=r"version 2 \(sender: fedpara-plugins 9\.9\).*reads.* 1"
    ):
        receive(data, model())


def test_an_unknown_stage_is_named_with_those_known_here():
    data = rewritten(sent(model()), lambda header: header.update(codec="delta+unheard+zlib"))
    with pytest.raises(MismatchError, match=r"delta, .*missing here is unheard"):
        receive(data, model())


def test_the_header_says_all_that_two_sides_must_agree_on():
    net = model()
    reference = shared(net)
    _, header, _ = parts(sent(net, codec="int8", reference=reference))
    assert header["version"] == 1
    assert header["plugin"] == fedpara.__version__
    assert header["codec"] == "delta+int8+zlib"
    assert header["reference"] == reference_hash(reference)
    assert header["model"]["fingerprint"] == ModelSpec.of(net).fingerprint
    rows = {row[0]: (row[1], row[3]) for row in header["model"]["weights"]}
    plans = {"0.weight": net[0].plans["weight"], "2.weight": net[2].plans["weight"]}
    assert rows == {name: ("pfedpara", plan.rank) for name, plan in plans.items()}


@pytest.mark.parametrize(
    "change",
    [lambda header: header.update(more=1), lambda header: header["notes"].__setitem__(0, {"x": 1})],
    ids=["field", "notes"],
)
def test_what_another_version_of_the_plugin_may_have_written_names_both(change):
    data = rewritten(sent(model()), lambda header: (change(header), header.update(plugin="9.9")))
    with pytest.raises(PayloadError) as caught:
        receive(data, model(), decoding=True)
    assert f"sender has fedpara-plugins 9.9, this side {fedpara.__version__}" in str(caught.value)
    with pytest.raises(PayloadError) as caught:  # of the same version it is not the reason
        receive(rewritten(sent(model()), change), model(), decoding=True)
    assert "fedpara-plugins" not in str(caught.value)


def test_another_version_of_the_plugin_alone_is_no_obstacle():
    data = rewritten(sent(model()), lambda header: header.update(plugin="9.9"))
    assert receive(data, model(), decoding=True).header.plugin_version == "9.9"
