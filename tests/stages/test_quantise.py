"""Stage quantise: one step a tensor, row or block; nearest or stochastic."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.quantise import QuantiseStage
from fedpara_plugins.testing.stage_contract import StageContract

TINY = torch.finfo(torch.float32).tiny


def round_trip(stage, tensor):
    coded, notes = stage.encode({"x": tensor}, reference=None)
    return stage.decode(coded, notes, reference=None, limit=10**8)["x"]


class QuantiseContract(StageContract):
    def error_bound(self, tensor, reference):
        # A step is at most max|x| (2 bits, a coarse rms): half of it, or all where chance rounds.
        step = max(float(tensor.abs().max()), TINY)
        whole = self.stage.rounding == "stochastic"
        return step / (1 if whole else 2) * (1 + 1e-5) + tensor.abs() * 2**-7


class TestBits(QuantiseContract):
    stage = QuantiseStage(bits=4)


class TestRms(QuantiseContract):
    stage = QuantiseStage(bits=None, rms=2.0)


class TestRows(QuantiseContract):
    stage = QuantiseStage(bits=6, scope="row")


class TestBlocks(QuantiseContract):
    stage = QuantiseStage(bits=5, scope="block", block=16)


def seeded():
    return torch.Generator().manual_seed(3)


class TestStochastic(QuantiseContract):
    stage = QuantiseStage(bits=4, rounding="stochastic", generator=seeded)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16])
def test_bits_give_that_many_levels_and_half_a_step_of_error(bits):
    tensor = torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    back = round_trip(QuantiseStage(bits=bits), tensor)
    step = float(tensor.abs().max()) / (2 ** (bits - 1) - 1)
    assert len(back.unique()) <= 2**bits - 1
    # Half a step, and the rounding of the product to float32.
    rounding = float(tensor.abs().max()) * 2**-23
    assert float((back - tensor).abs().max()) <= step / 2 * (1 + 1e-4) + rounding


@pytest.mark.parametrize("rms", [0.05, 0.5, 2.0])
def test_a_step_relative_to_the_root_mean_square(rms):
    """Whatever the tensor's scale, and without clipping its largest values."""
    tensor = torch.randn(300, 40, generator=torch.Generator().manual_seed(2))
    tensor[0, 0] = 60.0
    for scale in (1e-6, 1.0, 1e6):
        x = tensor * scale
        step = rms * float(x.square().mean().sqrt())
        back = round_trip(QuantiseStage(bits=None, rms=rms), x)
        assert float((back - x).abs().max()) <= step / 2 * (1 + 1e-4)
        multiples = back / step
        assert float((multiples - multiples.round()).abs().max()) < 1e-3


@pytest.mark.parametrize(("scope", "groups"), [("row", 8), ("block", 32)])
def test_rows_and_blocks_have_steps_of_their_own(scope, groups):
    tensor = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    parts = tensor.view(groups, -1)
    parts *= 10.0 ** torch.arange(groups).fmod(5).view(-1, 1)
    back = round_trip(QuantiseStage(bits=8, scope=scope, block=16), tensor).view(groups, -1)
    for part, found in zip(parts, back, strict=True):
        assert float((found - part).abs().max()) <= float(part.abs().max()) / 127 / 2 * (1 + 1e-4)


def test_vectors_have_eight_bits_whatever_the_step():
    bias = torch.randn(500, generator=torch.Generator().manual_seed(5))
    back = round_trip(QuantiseStage(bits=None, rms=4.0), bias)
    assert float((back - bias).abs().max()) <= float(bias.abs().max()) / 127 / 2 * (1 + 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2},
        {"bits": 3, "scope": "row"},
        {"bits": None, "rms": 1.3},
        {"bits": None, "rms": 4.0},
        {"bits": None, "rms": 2.0, "scope": "row"},
        {"bits": None, "rms": 1.0, "scope": "block", "block": 16},
    ],
)
def test_stochastic_rounding_is_unbiased_and_nearest_is_not(options):
    """Mean of 4,000 independent roundings; five standard errors of a chance within one step."""
    row = torch.tensor([[0.3, 0.1, -0.45, 0.77, 1.0, -0.02, 0.0, -1.0]])
    tensor = torch.cat([row, 3 * row, row / 64, row])
    stage = QuantiseStage(**options, rounding="stochastic", generator=fresh(11))
    tries = 4000
    copies = round_trip(stage, tensor.repeat(tries, 1))  # all with the same steps
    mean = copies.view(tries, *tensor.shape).mean(0)
    # No step is larger than the largest value that shares it.
    near = tensor.abs().amax(1, keepdim=True) if stage.scope == "row" else tensor.abs().max()
    bound = 5 * 0.5 * near / tries**0.5
    assert ((mean - tensor).abs() < bound).all()
    nearest = round_trip(QuantiseStage(**options), tensor)
    assert ((nearest - tensor).abs() > 2 * bound).any()


def fresh(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda: generator


def test_without_a_seed_chance_differs_and_torchs_own_generator_stays_untouched():
    tensor = torch.randn(50, 50, generator=torch.Generator().manual_seed(6))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stage = QuantiseStage(bits=2, rounding="stochastic")
    assert not torch.equal(round_trip(stage, tensor), round_trip(stage, tensor))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("beside", [1.0, float("inf"), -float("inf")])
def test_nan_is_refused_with_the_tensors_name(beside):
    tensor = torch.ones(20, 20)
    tensor[3, 4], tensor[5, 6] = float("nan"), beside
    with pytest.raises(PayloadError, match="'layer'"):
        QuantiseStage(bits=4).encode({"layer": tensor}, reference=None)
