"""A client's record to a payload, and what the codec loses of it."""

from __future__ import annotations

import torch

from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec, peek_header
from fedpara_plugins.exchange.coding import encode_record, update_codec
from fedpara_plugins.exchange.outgoing import Outgoing
from fedpara_plugins.exchange.records import plain_spec
from fedpara_plugins.references import ClientReferences

CODEC = parse_codec("delta+feedback+int8")
TENSORS = {"a": torch.linspace(0, 1, 7), "b": torch.linspace(2, 3, 5)}
RECORD = Outgoing(plain_spec(TENSORS), TENSORS)


def received(tensors):
    payload = encode_payload(tensors, codec=parse_codec("none"))
    return ClientReferences().receive("model", payload, limit=10**6)


def test_a_record_is_coded_against_what_was_received():
    before = received({name: value - 0.1 for name, value in TENSORS.items()})
    coded = encode_record(RECORD, codec=CODEC, received=before)
    assert peek_header(coded.payload).reference == before.reference
    references = {before.reference: before.tensors}
    back = decode_payload(coded.payload, references=references, limit=10**6).tensors
    for name, value in TENSORS.items():
        assert torch.allclose(coded.lost.get(name, torch.zeros(())), value - back[name], atol=1e-7)


def test_other_names_shapes_or_dtypes_are_no_reference():
    for other in (
        {"a": TENSORS["a"]},
        {**TENSORS, "b": torch.ones(4)},
        {**TENSORS, "b": TENSORS["b"].double()},
    ):
        coded = encode_record(RECORD, codec=CODEC, received=received(other))
        assert peek_header(coded.payload).reference is None
        assert set(decode_payload(coded.payload, limit=10**6).tensors) == set(TENSORS)


def test_what_is_made_up_for_is_no_loss():
    """The residual arrives with the tensor: the receiver has more than the tensor given."""
    residual = {"a": torch.full((7,), 0.25), "b": torch.ones(4), "gone": torch.ones(1)}
    coded = encode_record(RECORD, codec=CODEC, residual=residual)
    back = decode_payload(coded.payload, limit=10**6).tensors
    assert coded.residual == {}
    assert torch.equal(back["b"], TENSORS["b"])
    assert coded.lost.keys() == {"a"}
    assert torch.allclose(coded.lost["a"], TENSORS["a"] - back["a"])
    assert torch.allclose(coded.lost["a"], torch.tensor(-0.25))


def test_the_loss_is_told_where_it_is_asked_for():
    codec, before = parse_codec("delta+int8"), received({k: v**2 for k, v in TENSORS.items()})
    silent = encode_record(RECORD, codec=codec, received=before)
    told = encode_record(RECORD, codec=codec, received=before, with_loss=True)
    assert silent.payload == told.payload
    assert silent.lost == {}
    references = {before.reference: before.tensors}
    back = decode_payload(told.payload, references=references, limit=10**6).tensors
    assert not torch.equal(back["a"], TENSORS["a"])
    assert torch.allclose(told.lost["a"], TENSORS["a"] - back["a"], atol=1e-7)
    assert encode_record(RECORD, codec=parse_codec("zlib"), with_loss=True).lost == {}


def test_an_update_is_coded_without_reference_and_feedback():
    codec = update_codec(CODEC)
    assert not codec.feedback
    assert [stage.name for stage in codec.stages] == ["int8"]
