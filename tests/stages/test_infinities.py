"""Infinities that belong to a model, such as a mask of ``-inf``, through every chain of stages."""

import math

import pytest
import torch
from page_decoder import by_the_page

from fedpara_plugins import PayloadError
from fedpara_plugins.codecs import (
    PRESETS,
    decode_payload,
    encode_payload,
    encode_with_feedback,
    parse_codec,
    peek_header,
)
from fedpara_plugins.stages.delta import DeltaStage

INF, NAN = math.inf, math.nan

LOSSY = [
    *(name for name in PRESETS if name not in ("none", "lossless")),
    "int8+zlib",
    "delta+cast:to=bf16+zlib",
    "delta+topk:share=0.1+quantise:bits=8+ans",
    "quantise:bits=4,scope=row+zlib",
    "delta+quantise:bits=4,scope=block,block=16,rounding=stochastic",
    "grid+zlib",
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def masked(dtype=torch.float32, *, seed=0):
    """A causal mask, a trained bias with -inf in it, a constant of +inf, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(40, generator=generator)
    bias[3] = -INF
    return {
        "mask": torch.full((16, 16), -INF).triu(1).to(dtype),
        "bias": bias.to(dtype),
        "top": torch.tensor(INF).to(dtype),
        "weight": torch.randn(24, 8, generator=generator).to(dtype),
    }


def same_infinities(found, sent):
    return all(
        torch.equal(value.isinf() * value.sign(), sent[name].isinf() * sent[name].sign())
        for name, value in found.items()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", LOSSY)
def test_a_mask_arrives_bit_by_bit_and_again(codec, dtype):
    """At first contact (against zeros), then against itself: two decoders agree, ours and the
    page's, which knows the format as earlier releases read it."""
    before, after = masked(dtype), masked(dtype, seed=1)
    zeros = {name: torch.zeros_like(value) for name, value in before.items()}
    for sent, reference in [(before, zeros), (after, before), (before, before)]:
        data = encode_payload(sent, codec=parse_codec(codec), reference=reference)
        found = decode_payload(data, reference=reference, limit=10**6).tensors
        assert torch.equal(found["mask"], sent["mask"])
        assert same_infinities(found, sent)
        assert torch.isfinite(found["weight"]).all()
        held = by_the_page(encode_payload(reference, codec=parse_codec("none")))
        theirs = by_the_page(data, held)
        for name, (_, _, values) in theirs.items():
            assert values == found[name].double().reshape(-1).tolist(), name


@pytest.mark.parametrize("codec", [name for name in LOSSY if name in PRESETS or "topk" in name])
def test_a_mask_that_does_not_change_costs_next_to_nothing(codec):
    mask = torch.full((128, 128), -INF).triu(1)
    state = {"mask": mask, "weight": torch.ones(4, 4)}
    data = encode_payload(state, codec=parse_codec(codec), reference=state)
    without = encode_payload({"weight": state["weight"]}, codec=parse_codec(codec), reference=state)
    assert len(data) - len(without) < mask.nbytes / 100


@pytest.mark.parametrize("value", [0.0, INF, 1.5, NAN])
def test_a_mask_that_changes_is_sent_whole(value):
    before = {"mask": torch.full((4, 4), -INF), "other": torch.ones(2)}
    after = {"mask": before["mask"].clone(), "other": torch.ones(2)}
    after["mask"][1, 2] = value
    coded, notes = DeltaStage().encode(after, reference=before)
    back = DeltaStage().decode(dict(coded), notes, reference=before, limit=1000)
    torch.testing.assert_close(back["mask"], after["mask"], rtol=0, atol=0, equal_nan=True)
    # Only NaN plus anything is NaN; a sum of -inf and a number is -inf.
    assert notes == ({} if math.isnan(value) else {"whole": [0]})


@pytest.mark.parametrize("old", [NAN, INF])
def test_what_was_not_finite_and_stays_so_has_no_difference(old):
    state = {"x": torch.tensor([old, 1.0])}
    coded, notes = DeltaStage().encode({"x": torch.tensor([old, 3.0])}, reference=state)
    assert (coded["x"].tolist(), notes) == ([0.0, 2.0], {})


@pytest.mark.parametrize("codec", [c for c in LOSSY if "cast" not in c and "grid" not in c])
def test_nan_is_refused_beside_infinities(codec):
    state = masked()
    state["weight"][0, 0], state["weight"][0, 1] = NAN, INF
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    with pytest.raises(PayloadError, match=r"'weight': 1 of 192 values are NaN"):
        encode_payload(state, codec=parse_codec(codec), reference=zeros)


@pytest.mark.parametrize("codec", ["small", "tiny"])
def test_error_feedback_goes_on_beside_an_infinity(codec, caplog):
    """A bias with one masked place: what is lost elsewhere arrives later, and nothing is NaN."""
    codec, residual = parse_codec(codec), None
    held, exact = masked(), masked()
    for _ in range(200):
        exact = {k: v + (0.001 if k in ("bias", "weight") else 0.0) for k, v in exact.items()}
        data, residual = encode_with_feedback(exact, codec=codec, reference=held, residual=residual)
        held = decode_payload(data, reference=held, limit=10**6).tensors
        assert all(torch.isfinite(value).all() for value in residual.values())
    for name in ("bias", "weight"):
        places = torch.isfinite(exact[name])
        assert (held[name] - exact[name])[places].abs().max() < 0.01
        assert held[name][places].ne(masked()[name][places]).all()
    assert torch.equal(held["mask"], masked()["mask"])
    assert held["bias"][3] == -INF
    assert not caplog.records  # no residual is dropped


def test_the_first_message_names_the_tensors_as_passed():
    data = encode_payload(masked(), codec=parse_codec("quantise+zlib"))
    assert peek_header(data).notes[0]["each"] == "---0"
