"""Error feedback: what one payload lost, the next ones bring."""

from __future__ import annotations

import logging

import torch

from fedpara_plugins.codecs import decode_payload, encode_with_feedback, parse_codec


def sums(text, rounds):
    """Mean of what arrives, when the sender means the same update every time."""
    update = {"w": torch.randn(40, 40, generator=torch.Generator().manual_seed(1))}
    zero = {"w": torch.zeros(40, 40)}
    codec, residual = parse_codec(text), None
    total = torch.zeros(40, 40)
    for _ in range(rounds):
        payload, residual = encode_with_feedback(
            update, codec=codec, reference=zero, residual=residual
        )
        total += decode_payload(payload, reference=zero, limit=10**6).tensors["w"]
    return (total / rounds - update["w"]).norm() / update["w"].norm()


def test_the_mean_of_what_arrives_becomes_what_was_meant():
    few, many = sums("tiny", 10), sums("tiny", 100)
    assert many < 0.1
    assert many < few / 4  # as 1 / rounds
    assert sums("delta+quantise:rms=4+zlib", 100) > 0.5


def test_the_residual_is_what_was_wanted_minus_what_arrives():
    state = {"w": torch.randn(30, 20), "n": torch.tensor(3)}
    zero = {name: torch.zeros_like(value) for name, value in state.items()}
    payload, residual = encode_with_feedback(
        state, codec=parse_codec("small"), reference=zero, residual=None
    )
    back = decode_payload(payload, reference=zero, limit=10**5).tensors
    assert list(residual) == ["w"]
    torch.testing.assert_close(residual["w"], state["w"] - back["w"])
    assert torch.equal(back["n"], state["n"])


def test_a_first_contact_loses_nothing_and_leaves_nothing():
    state = {"w": torch.randn(30, 20)}
    rest = {"w": torch.full((30, 20), 0.5)}
    payload, residual = encode_with_feedback(
        state, codec=parse_codec("small"), reference=None, residual=rest
    )
    assert residual == {}
    back = decode_payload(payload, limit=10**5).tensors["w"]
    assert torch.equal(back, state["w"] + rest["w"])


def test_a_residual_of_another_model_is_dropped_and_said(caplog):
    state, zero = {"w": torch.randn(30, 20)}, {"w": torch.zeros(30, 20)}
    codec = parse_codec("small")
    plain, _ = encode_with_feedback(state, codec=codec, reference=zero, residual=None)
    with caplog.at_level(logging.WARNING):
        other, _ = encode_with_feedback(
            state, codec=codec, reference=zero, residual={"w": torch.ones(2, 2)}
        )
    assert other == plain
    assert "another model" in caplog.text


def test_without_the_word_there_is_no_residual():
    state, zero = {"w": torch.randn(30, 20)}, {"w": torch.zeros(30, 20)}
    _, residual = encode_with_feedback(
        state, codec=parse_codec("balanced"), reference=zero, residual={"w": torch.ones(30, 20)}
    )
    assert residual == {}
