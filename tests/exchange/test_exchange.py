"""What every adapter does with a message's tensors, without any framework."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError, MismatchError, ModelSpec
from fedpara_plugins.codecs import parse_codec
from fedpara_plugins.exchange.coding import check_names, encode
from fedpara_plugins.exchange.downlink_encoder import DownlinkEncoder, cast
from fedpara_plugins.exchange.plain_values import pack_plain, unpack_plain
from fedpara_plugins.exchange.settings import ExchangeSettings, codecs_in_words
from fedpara_plugins.references import ClientReferences
from fedpara_plugins.support.storage import replace_file


def settings(**options):
    return ExchangeSettings(**ExchangeSettings.read(dict(options)))


def plain(*names):
    return ModelSpec(weights={}, keys=names, seed=0)


def same(one, other):
    if isinstance(one, torch.Tensor | np.ndarray | np.generic):
        return type(one) is type(other) and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


VALUE = {
    "moments": {"a": torch.arange(3.0), 7: np.arange(2)},
    "number": np.float64(2.5),
    "rest": [1, 2.5, "x", None, True, (math.inf, math.nan), {}],
}


def test_nested_values_come_back_as_they_were():
    tensors = {}
    packed = pack_plain(VALUE, tensors)
    assert same(unpack_plain(packed, tensors), VALUE)
    assert all(type(value) is torch.Tensor for value in tensors.values())


def test_a_kind_that_cannot_be_kept_is_named():
    with pytest.raises(TypeError, match="cannot keep a set"):
        pack_plain({"names": [{1, 2}]}, {})


def test_other_kinds_are_kept_by_whoever_knows_them():
    tensors = {}

    def others(value):
        return ("complex", [value.real, value.imag]) if isinstance(value, complex) else None

    packed = pack_plain({"z": [1 + 2j]}, tensors, others)
    assert unpack_plain(packed, tensors, {"complex": lambda pair: complex(*pair)}) == {
        "z": [1 + 2j]
    }


def test_a_file_is_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"first")

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"second")
    assert path.read_bytes() == b"first"


def test_a_users_home_in_a_path_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("ledger", "checkpoint", "client_checkpoints", "state_dir")
    found = settings(**{name: f"~/runs/{name}" for name in names})
    assert [getattr(found, name) for name in names] == [tmp_path / "runs" / n for n in names]
    assert settings(ledger="a/~b").ledger == Path("a/~b")
    assert settings(ledger="").ledger is None
    with pytest.raises(ConfigError, match="option 'state_dir': the ~ of '~nobody-of-that-name/x'"):
        settings(state_dir="~nobody-of-that-name/x")


def test_what_a_client_answers_is_completed_and_checked():
    encoder = DownlinkEncoder(settings(codec="balanced"))
    state = {"a": torch.randn(3, 4), "b": torch.arange(5)}
    encoder.put("model", state, plain("a", "b"))
    other = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.int64)}
    assert encoder.completed("model", other) == other
    with pytest.raises(MismatchError, match="'a' of shape"):
        encoder.completed("model", {**other, "a": torch.zeros(4, 3)})
    with pytest.raises(MismatchError, match="other names"):
        encoder.completed("model", {"a": other["a"]})
    assert set(encoder.completed("model", {"a": other["a"]}, partial=True)) == {"a"}
    assert encoder.limit("model") == encoder.limit(None) == 2 * (12 * 4 + 5 * 8) + 1_000_000


def test_a_client_that_lost_records_which_were_never_sent_fills_no_table():
    encoder = DownlinkEncoder(settings(codec="balanced"))
    encoder.put("model", {"a": torch.zeros(3)}, plain("a"))
    told = []
    encoder._downlink.refused = lambda client, record, held: told.append(record)
    encoder.refused("7", {**{f"r{number}": () for number in range(100)}, "model": ()})
    assert told == ["model"]


def test_a_client_that_lost_it_gets_what_it_can_decode():
    encoder, client = DownlinkEncoder(settings(codec="balanced")), ClientReferences()
    sizes = []
    for round_ in range(4):
        # It forgets everything before the third message, and says so.
        if round_ == 2:
            client = ClientReferences()
            encoder.refused("7", {"model": ()})
        torch.manual_seed(round_)
        state = {"a": torch.randn(40, 50)}
        encoder.put("model", state, plain("a"))
        data = encoder.encode("7", "model")
        received = client.receive("model", data, limit=10**6)
        client.keep("model", received)
        encoder.acknowledge("7", {"model": received.reference}, ())
        sizes.append(len(data))
        assert (received.tensors["a"] - state["a"]).abs().max() < 4
    assert sizes[2] > sizes[1]
    assert torch.equal(encoder.references[received.reference]["a"], received.tensors["a"])


def test_integers_are_rounded_and_floats_are_not():
    assert cast(torch.tensor([1.6, -0.4]), torch.int64).tolist() == [2, 0]
    value = torch.tensor([1.6])
    assert cast(value, torch.float32) is value


def test_sections_of_all_adapters_are_read_alike(tmp_path):
    found = settings(codec="small", downlink_codec="none", ledger=str(tmp_path / "l"), state_dir="")
    assert (found.ledger, found.state_dir) == (tmp_path / "l", None)
    assert found.uplink.feedback
    assert not found.downlink.feedback
    assert found.codec_names[1] == "none"
    assert not found.uncoded
    with pytest.raises(ConfigError, match="references"):
        settings(references="server")
    with pytest.raises(ConfigError, match="reference_memory"):
        settings(reference_memory="much")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"codec": "small"}, "small"),  # whose feedback the downlink has not
        ({"codec": "none"}, "none"),
        ({"codec": "delta+int8"}, "delta+int8"),
        ({"uplink_codec": "small"}, "up small, down none"),
        ({"codec": "tiny", "downlink_codec": "balanced"}, "up tiny, down balanced"),
    ],
)
def test_codecs_are_told_as_users_write_them(section, words):
    assert codecs_in_words(settings(**section).codec_names) == words
    assert codecs_in_words(["of a stranger"]) == "of a stranger"


@pytest.mark.parametrize("prefix", ["_orig_mod", "module", "module._orig_mod"])
@pytest.mark.parametrize("dense", [False, True])
def test_names_of_a_wrapped_model_are_refused_before_anything_is_sent(prefix, dense):
    """What is private is known by its name, and would leave the device under another."""
    model = fedpara.convert(nn.Sequential(nn.Linear(64, 48)), method="pfedpara", gamma=0.2)
    spec = ModelSpec.of(model)
    state = spec.dense_state(model.state_dict()) if dense else model.state_dict()
    wrapped = {f"{prefix}.{name}": value for name, value in state.items()}
    with pytest.raises(MismatchError, match=f"Answer with the state.*model.{prefix}.state_dict"):
        encode(wrapped, spec=spec, codec=parse_codec("none"), reference=None)


def test_tensors_that_the_model_does_not_have():
    spec, tensors = plain("a.weight"), {"a.weight": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(MismatchError, match="'b', which the model does not have"):
        check_names(spec, tensors)
    check_names(spec, tensors, others=True)
