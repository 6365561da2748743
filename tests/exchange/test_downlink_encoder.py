"""What a server sends, each record coded against what its receiver holds."""

import math

import pytest
import torch

from fedpara_plugins import PayloadError
from fedpara_plugins.exchange import DownlinkEncoder, plain_spec
from fedpara_plugins.references import ClientReferences


def test_a_client_that_lost_records_which_were_never_sent_fills_no_table(helpers):
    encoder = DownlinkEncoder(helpers.settings_of(codec="balanced"))
    encoder.put("model", {"a": torch.zeros(3)}, plain_spec(["a"]))
    told = []
    encoder._downlink.refused = lambda client, record, held: told.append(record)
    encoder.note_refusal("7", {**{f"r{number}": () for number in range(100)}, "model": ()})
    assert told == ["model"]


def test_a_client_that_lost_it_gets_what_it_can_decode(helpers):
    encoder, client = DownlinkEncoder(helpers.settings_of(codec="balanced")), ClientReferences()
    sizes = []
    for round_ in range(4):
        # It forgets everything before the third message, and says so.
        if round_ == 2:
            client = ClientReferences()
            encoder.note_refusal("7", {"model": ()})
        torch.manual_seed(round_)
        state = {"a": torch.randn(40, 50)}
        encoder.put("model", state, plain_spec(["a"]))
        data = encoder.encode("7", "model")
        received = client.receive("model", data, limit=10**6)
        client.keep("model", received)
        encoder.acknowledge("7", {"model": received.reference}, ())
        sizes.append(len(data))
        assert (received.tensors["a"] - state["a"]).abs().max() < 4
    assert sizes[2] > sizes[1]
    assert torch.equal(encoder.references[received.reference]["a"], received.tensors["a"])


INF = math.inf


def test_a_mask_that_a_strategy_lost_is_given_back_and_a_changed_one_is_not(helpers):
    encoder = DownlinkEncoder(helpers.settings_of(codec="small"))
    mask = torch.tensor([0.0, -INF, INF, -INF])
    for found, wanted in [
        (mask, mask),
        (mask + (mask - mask), mask),
        (torch.tensor([0.0, 0.0, INF, -INF]), torch.tensor([0.0, 0.0, INF, -INF])),
    ]:
        encoder.put("model", {"mask": found}, plain_spec(["mask"]))
        assert torch.equal(encoder.content("model")["mask"], wanted)
        received = ClientReferences().receive("model", encoder.encode("7", "model"), limit=10**6)
        assert torch.equal(received.tensors["mask"], wanted)


@pytest.mark.parametrize("value", [INF, math.nan])
def test_a_strategy_that_diverges_is_told_with_the_tensor(helpers, value):
    encoder = DownlinkEncoder(helpers.settings_of(codec="lossless"))
    encoder.put("model", {"a": torch.tensor([1.0, -INF])}, plain_spec(["a"]))
    with pytest.raises(PayloadError, match=r"holds 1 NaN or infinite values of 2 in 'a'.*strategy"):
        encoder.put("model", {"a": torch.tensor([value, -INF])}, plain_spec(["a"]))
    # What is sent under a name for the first time, or in another shape, begins.
    encoder.put("model", {"a": torch.full((3,), value)}, plain_spec(["a"]))
    encoder.put("other", {"a": torch.full((2,), value)}, plain_spec(["a"]))
