"""The bound of a first model, which nothing else bounds, and the budget of all other messages."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.exchange.budget import MessageBudget
from fedpara_plugins.exchange.headers import first_model_limit


def test_a_first_model_is_bounded_by_its_payload():
    assert first_model_limit(b"") == 2**28
    assert first_model_limit(bytes(2**23)) == 2**29


def test_all_records_of_a_message_share_a_budget():
    budget = MessageBudget(1000)
    state = {"w": torch.zeros(10**6)}
    data = encode_payload(state, codec=parse_codec("zlib"))
    assert len(data) < 10_000
    tensors = decode_payload(data, limit=budget.left).tensors
    budget.spend(sum(value.nbytes for value in tensors.values()))
    with pytest.raises(PayloadError, match="limit of 196304 bytes"):
        decode_payload(data, limit=budget.left)
    with pytest.raises(PayloadError, match="this side's own model allows 4196304"):
        budget.spend(196_305)
    assert budget.left == 0
