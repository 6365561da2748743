"""Stage quantise where numbers end, where chance or feedback could go wrong, and what it costs."""

from __future__ import annotations

import base64
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpara_plugins.codecs import (
    decode_payload,
    encode_payload,
    encode_with_feedback,
    parse_codec,
)
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.delta import DeltaStage
from fedpara_plugins.stages.quantise import QuantiseStage
from fedpara_plugins.stages.topk import TopkStage
from fedpara_plugins.testing.samples import same_bits

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def round_trip(stage, tensor):
    coded, notes = stage.encode({"x": tensor}, reference=None)
    size = tensor.nbytes
    assert sum(part.nbytes for part in coded.values()) <= size  # what a receiver allows
    return stage.decode(coded, notes, reference=None, limit=size)["x"]


stages = st.builds(
    lambda step, scope, rounding: QuantiseStage(
        bits=step if isinstance(step, int) else None,
        rms=step if isinstance(step, float) else None,
        scope=scope,
        block=16,
        rounding=rounding,
    ),
    st.integers(2, 16) | st.floats(0.001, 16),
    st.sampled_from(["tensor", "row", "block"]),
    st.sampled_from(["nearest", "stochastic"]),
)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=200)
@given(stage=stages, values=st.lists(numbers, min_size=1, max_size=40), data=st.data())
def test_any_finite_numbers_come_back_finite_within_a_step(stage, values, data):
    dtype = data.draw(st.sampled_from(FLOATS))
    top = torch.finfo(dtype).max
    flat = torch.tensor([max(-top, min(top, value)) for value in values], dtype=torch.float64)
    tensor = flat.to(dtype).reshape(-1, data.draw(st.sampled_from([1, len(values)])))
    back = round_trip(stage, tensor)
    assert back.dtype == dtype
    assert torch.isfinite(back).all()
    exact, peak = tensor.double(), float(tensor.double().abs().max())
    # No step exceeds the peak, except that steps are normal numbers.
    step = max(peak, torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny)
    slack = peak * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    # Halved, since the difference of two doubles may leave their range.
    assert float((exact / 2 - back.double() / 2).abs().max()) <= step / 2 * (1 + 1e-6) + slack


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_rounding_up_never_leaves_the_dtype(dtype, rounding):
    top = torch.finfo(dtype).max
    tensor = torch.tensor([[top, -top, top * 0.3, 0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    steps = [{"rms": rms} for rms in (0.05, 0.7, 1.3, 2.0)]
    for step in [*steps, *({"bits": bits} for bits in range(2, 17))]:
        stage = QuantiseStage(**{"bits": None, **step}, rounding=rounding)
        assert torch.isfinite(round_trip(stage, tensor)).all()


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_updates_of_one_magnitude_are_not_starved(preset):
    """With s = c * rms alone, no value of a sign update would ever reach half a step."""
    signs = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).sign() * 1e-3
    zero, residual = {"w": torch.zeros(40, 30)}, None
    payload, residual = encode_with_feedback(
        {"w": signs}, codec=parse_codec(preset), reference=zero, residual=residual
    )
    back = decode_payload(payload, reference=zero, limit=10**5).tensors["w"]
    assert torch.equal(back, signs)
    assert residual == {}


@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "signs", "sparse", "constant"])
def test_balanced_reconstructs_an_update_within_two_percent(kind):
    draw = torch.Generator().manual_seed(2)
    normal = torch.randn(200, 300, generator=draw)
    update = {
        "normal": normal,
        "heavy": normal * torch.randn(200, 300, generator=draw).mul(2).exp(),
        "uniform": torch.rand(200, 300, generator=draw) - 0.5,
        "signs": normal.sign(),
        "sparse": normal * (torch.rand(200, 300, generator=draw) < 0.01),
        "constant": torch.full((200, 300), 0.7),
    }[kind]
    zero = {"w": torch.zeros(200, 300)}
    data = encode_payload({"w": update}, codec=parse_codec("balanced"), reference=zero)
    back = decode_payload(data, reference=zero, limit=10**6).tensors["w"]
    assert float((back - update).norm() / update.norm()) <= 0.02


def test_one_far_value_costs_an_escape_and_not_a_wider_tensor():
    tensor = torch.randn(50, 40, generator=torch.Generator().manual_seed(3))
    tensor[7, 5] = 1000.0
    coded, notes = QuantiseStage(None, 0.01).encode({"far": tensor}, reference=None)
    assert [part.dtype for part in coded.values()] == [torch.int8, torch.int16]
    assert (list(coded), notes["far"]) == (["far", "far'"], len(coded["far'"]))
    assert int((coded["far"] == -128).sum()) == notes["far"] >= 1


@pytest.mark.parametrize("far", [[1], [1, 2, 3]])
def test_escapes_without_a_value_and_values_without_an_escape_are_refused(far):
    stage = QuantiseStage(None, 0.05)
    tensor = torch.ones(30, 30)
    tensor[0, :2] = 500.0
    coded, notes = stage.encode({"x": tensor}, reference=None)
    assert notes["far"] == 2
    forged = {"x": coded["x"], "far": torch.tensor(far, dtype=torch.int16)}
    with pytest.raises(PayloadError, match="escape"):
        stage.decode(forged, {**notes, "far": len(far)}, reference=None, limit=10**5)


def test_a_product_beyond_the_dtype_is_refused():
    stage = QuantiseStage(8)
    coded, notes = stage.encode({"x": torch.full((3, 3), 60000.0).half()}, reference=None)
    forged = {"x": torch.full((3, 3), 2**15 - 1, dtype=torch.int16)}
    with pytest.raises(PayloadError, match=r"'x'.*F16"):
        stage.decode(forged, notes, reference=None, limit=10**5)
    assert coded["x"].dtype == torch.int8


def test_values_of_no_dimension_survive_every_lossy_chain_exactly():
    tensors = {"t": torch.tensor(0.1), "huge": torch.tensor(1e-30), "n": torch.tensor(7)}
    reference = {"t": torch.tensor(77.7), "huge": torch.tensor(3e38), "n": torch.tensor(1)}
    for text in ("delta", "int8", "balanced", "tiny", "delta+topk+cast:to=fp16+zlib"):
        data = encode_payload(tensors, codec=parse_codec(text), reference=reference)
        back = decode_payload(data, reference=reference, limit=100).tensors
        assert same_bits(back, tensors), text


def test_a_delta_that_gives_the_value_back_travels_as_one():
    coded, notes = DeltaStage().encode(
        {"t": torch.tensor(0.75), "u": torch.tensor(0.1)},
        reference={"t": torch.tensor(0.5), "u": torch.tensor(77.7)},
    )
    assert (coded["t"].item(), notes) == (0.25, {"whole": [1]})
    with pytest.raises(PayloadError, match="places"):
        DeltaStage().decode(coded, {"whole": [2]}, reference=coded, limit=100)


def test_complex128_travels_in_a_stream_and_is_refused_with_the_remedy_elsewhere():
    bits = torch.tensor([math.nan, -0.0, 1e-310, math.inf], dtype=torch.float64)
    tensors = {"z": bits.view(torch.complex128), "e": torch.empty(0, 2, dtype=torch.complex128)}
    data = encode_payload(tensors, codec=parse_codec("lossless"))
    assert same_bits(decode_payload(data, limit=100).tensors, tensors)
    with pytest.raises(PayloadError, match=r"'z'.*complex128.*'lossless'"):
        encode_payload(tensors, codec=parse_codec("none"))


def test_nothing_that_is_not_finite_enters_the_residual():
    state = {"w": torch.tensor([[1.0001, math.nan, math.inf, 2.0]])}
    zero = {"w": torch.zeros(1, 4)}
    codec = parse_codec("delta+feedback+cast:to=bf16")
    _, residual = encode_with_feedback(state, codec=codec, reference=zero, residual=None)
    assert torch.isfinite(residual["w"]).all()
    assert residual["w"][0, 0] != 0
    broken = {"w": torch.full((1, 4), math.nan)}
    finite = {"w": torch.ones(1, 4)}
    payload, _ = encode_with_feedback(finite, codec=codec, reference=zero, residual=broken)
    assert torch.equal(
        decode_payload(payload, reference=zero, limit=100).tensors["w"], torch.ones(1, 4)
    )


def test_the_residual_of_half_precision_keeps_what_the_sum_loses():
    """A weight of 1 in float16 cannot take up 1e-5; forty of them must still arrive together."""
    codec = parse_codec("feedback+quantise:bits=16")
    state = {"w": torch.ones(8, 8, dtype=torch.float16)}
    residual = {"w": torch.full((8, 8), 1e-5)}
    _, kept = encode_with_feedback(state, codec=codec, reference=None, residual=residual)
    assert kept["w"].dtype == torch.float32
    assert float(kept["w"].mean()) == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_the_root_mean_square_is_right_where_its_squares_leave_float32(scale):
    tensor = torch.randn(30, 40, generator=torch.Generator().manual_seed(4)) * scale
    back = round_trip(QuantiseStage(None, 0.5), tensor)
    step = 0.5 * math.sqrt(float(tensor.double().square().mean()))
    smallest = float(back[back > 0].min())
    assert smallest == pytest.approx(step, rel=1e-3)


def test_the_last_block_has_the_root_mean_square_of_its_own_values():
    """Two values alone in a block of 16, both 3: their root mean square is 3."""
    tensor = torch.tensor([[0.0] * 8 + [1.0], [1.0] * 7 + [3.0, 3.0]])
    back = round_trip(QuantiseStage(None, 0.8, scope="block", block=16), tensor)
    assert back[1, -2:].tolist() == pytest.approx([2.4, 2.4])


def test_chance_never_exceeds_the_largest_value():
    """32,767 and a chance just below 1 add up to 32,768 in float32, once in a thousand times."""
    draw = torch.Generator().manual_seed(5)
    stage = QuantiseStage(16, rounding="stochastic", generator=lambda: draw)
    coded, _ = stage.encode({"x": torch.ones(200, 500)}, reference=None)
    assert (coded["x"].dtype, int(coded["x"].max())) == (torch.int16, 2**15 - 1)


@pytest.mark.parametrize("stage", [QuantiseStage(4), QuantiseStage(16), QuantiseStage(None, 0.01)])
def test_vectors_have_eight_bits_with_more_and_with_fewer(stage):
    coded, _ = stage.encode({"bias": torch.tensor([1.0, -0.5, 0.1])}, reference=None)
    assert coded["bias"].tolist() == [127, -64, 13]


@pytest.mark.parametrize("step", [0.0, -1.0, 1e-40, math.inf, math.nan])
def test_steps_that_are_no_normal_numbers_are_refused(step):
    coded, notes = QuantiseStage(8).encode({"x": torch.ones(2, 2)}, reference=None)
    notes = {**notes, "steps": base64.b64encode(struct.pack("<f", step)).decode()}
    with pytest.raises(PayloadError, match="step"):
        QuantiseStage(8).decode(
            {"x": torch.zeros_like(coded["x"])}, notes, reference=None, limit=100
        )


@pytest.mark.parametrize("share", [0.3, 0.6, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("dtype", FLOATS)
def test_topk_never_needs_more_bytes_than_the_tensors_it_was_given(share, dtype):
    tensor = torch.randn(30, 30, generator=torch.Generator().manual_seed(6)).to(dtype)
    round_trip(TopkStage(share=share), tensor)
