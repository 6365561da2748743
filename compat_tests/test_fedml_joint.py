"""Optimizers whose messages hold several records: they travel as one payload."""

from __future__ import annotations

from typing import Any

import pytest

from fedpara_plugins_fedml.messages.envelope import unpack
from harness.fedml.project import run
from harness.oracles.descriptions import separated

JOINT = "fedpara_joint"
RECORDS = {"SCAFFOLD": ({"model", "variate"}, {"model", "change"})}


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
