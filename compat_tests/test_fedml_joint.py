"""Optimizers whose messages hold several records: they travel as one payload."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpara_plugins_fedml.messages.envelope import unpack
from harness.fedml.project import model, run
from harness.oracles.descriptions import peek_header, separated

JOINT = "fedpara_joint"
RECORDS = {"SCAFFOLD": ({"model", "variate"}, {"model", "change"})}


def records(sent: Any) -> dict[str, bytes]:
    """Return the payloads of a message by record."""
    return separated(unpack(sent.data).payloads)


def federated(**keys: Any) -> Any:
    return run(comm_round=3, client_num_per_round=4, **keys)


@pytest.mark.parametrize("codec", ["lossless", "small"])
@pytest.mark.parametrize("optimizer", RECORDS)
def test_the_records_of_a_message_are_one_payload(optimizer: str, codec: str) -> None:
    outcome = federated(federated_optimizer=optimizer, fedpara_codec=codec)
    later = [sent for sent in outcome.sent if sent.round > 1]
    down, up = RECORDS[optimizer]
    for direction, names in (("down", down), ("up", up)):
        found = [unpack(s.data) for s in later if s.direction == direction]
        several = [e for e in found if len(separated(e.payloads)) > 1]
        assert len(several) >= 8
        for envelope in several:
            assert set(envelope.payloads) == {JOINT}
            assert set(separated(envelope.payloads)) == names
            assert "holds" not in envelope.head


class Tabled(nn.Module):
    """A table that no training changes, and places that each training step may move."""

    def __init__(self, *, moves: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moves = moves
        self.layers = model()
        self.register_buffer("table", torch.arange(128.0).sin())
        self.register_buffer("places", torch.arange(96))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        if self.training and self.moves:
            self.places.copy_(self.places + 1)  # type: ignore[operator]
        out: Tensor = self.layers(x)
        return out


@pytest.mark.parametrize("optimizer", ["FedAvg", "SCAFFOLD"])
@pytest.mark.parametrize("moves", [False, True])
def test_buffers_that_nobody_changes_are_in_no_message(moves: bool, optimizer: str) -> None:
    keys = {"federated_optimizer": optimizer, "fedpara_codec": "lossless"}
    left_out = federated(net=Tabled(moves=moves), **keys)
    sent = federated(net=Tabled(moves=moves), fedpara_send="all", **keys)
    for name, value in sent.state.items():  # what is sent is averaged, and so rounded
        torch.testing.assert_close(left_out.state[name], value, rtol=1e-6, atol=0)
    told = [s.round for s in left_out.sent if "fedpara_changed_model" in records(s)]
    assert told == ([1] * 4 if moves else [])
    for each in left_out.sent[: 4 if moves else None]:
        if "model" in records(each):
            described = peek_header(records(each)["model"]).model or {}
            assert {row[1] for row in described["frozen"]} == {"table", "places"}
