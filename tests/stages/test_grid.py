"""Stage grid: differences of states on a grid, exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.stages.grid import GridStage
from fedpara_plugins.testing.samples import same_bits
from fedpara_plugins.testing.stage_contract import StageContract

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def grid_states(dtype, step, *, seed=0, size=500):
    """Two states of small multiples of a step, exact in every dtype."""
    draw = torch.Generator().manual_seed(seed)
    pair = [torch.randint(-60, 60, (size,), generator=draw).double() * step for _ in range(2)]
    return [{"x": value.to(dtype)} for value in pair]


class TestGrid(StageContract):
    stage = GridStage()

    def coded(self, tensor, reference):
        return self.stage.encode({"x": tensor}, reference={"x": reference})

    def decoded(self, coded, notes, reference, limit=10**6):
        return self.stage.decode(coded, notes, reference={"x": reference}, limit=limit)["x"]

    def test_known_values(self):
        reference = torch.tensor([1.0, 1.0, 1.0, 1.0])
        coded, notes = self.coded(torch.tensor([1.0, 1.5, 0.25, -2.0]), reference)
        assert coded["x"].dtype == torch.int8
        assert coded["x"].tolist() == [0, 2, -3, -12]
        assert notes == {"dtypes": ["F32"], "each": "0", "exponents": [-2]}

    @pytest.mark.parametrize(
        ("top", "dtype"),
        [
            (127, torch.int8),
            (128, torch.int16),
            (2**15 - 1, torch.int16),
            (2**15, torch.int32),
            (2**31 - 1, torch.int32),
        ],
    )
    def test_the_narrowest_symbols_that_hold_all_are_taken(self, top, dtype):
        tensor = torch.tensor([top, -top, 1, 0], dtype=torch.float64)
        reference = torch.zeros(4, dtype=torch.float64)
        coded, notes = self.coded(tensor, reference)
        assert coded["x"].dtype == dtype
        assert torch.equal(self.decoded(coded, notes, reference), tensor)

    def test_symbols_wider_than_the_values_are_not_taken(self):
        tensor = torch.tensor([2.0**-14, 60000.0], dtype=torch.float16)
        coded, _ = self.coded(tensor, torch.zeros(2, dtype=torch.float16))
        assert same_bits(coded, {"x": tensor})

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("step", [2.0**-10, 1.0, 8.0])
    def test_the_step_is_found_from_the_values(self, dtype, step):
        one, other = grid_states(dtype, step)
        coded, notes = self.stage.encode(one, reference=other)
        # Independent: exact fractions, the finest binary digit that any difference has.
        pairs = zip(one["x"].tolist(), other["x"].tolist(), strict=True)
        gaps = [Fraction(a) - Fraction(b) for a, b in pairs]
        exponent = max(e for e in range(-40, 40) if all(g % (Fraction(2) ** e) == 0 for g in gaps))
        assert notes["exponents"] == [exponent]
        assert coded["x"].tolist() == [int(g / Fraction(2) ** exponent) for g in gaps]
        assert same_bits(self.stage.decode(coded, notes, reference=other, limit=10**6), one)

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_equal_states_are_zeros_of_one_byte(self, dtype):
        one, _ = grid_states(dtype, 1.0)
        coded, _ = self.stage.encode(one, reference=one)
        assert coded["x"].dtype == torch.int8
        assert not coded["x"].any()

    def test_a_negative_zero_that_has_not_moved_stays_one(self):
        reference = torch.tensor([-0.0, 0.0, 1.0])
        tensor = torch.tensor([-0.0, 0.0, 1.5])
        coded, notes = self.coded(tensor, reference)
        assert coded["x"].tolist() == [0, 0, 1]
        assert same_bits({"x": self.decoded(coded, notes, reference)}, {"x": tensor})

    def test_what_lies_on_no_grid_passes_bit_by_bit(self):
        draw = torch.Generator().manual_seed(0)
        reference = torch.zeros(4)
        for tensor in (
            torch.tensor([1e30, 1e-30, 0.0, 1.0]),
            torch.tensor([float("nan"), float("inf"), 0.0, 1.0]),
            torch.tensor([-0.0, 1.0, 2.0, 3.0]),
            torch.randn(4, generator=draw) * torch.tensor([1.0, 1e-9, 1e9, 1.0]),
        ):
            coded, notes = self.coded(tensor, reference)
            assert notes == {"dtypes": [], "each": "-", "exponents": []}
            assert same_bits(coded, {"x": tensor})

    @pytest.mark.parametrize(
        "exponents", [[1.0], [True], [1001], [-1001], [10**30], [None], ["1"], [], [1, 1]]
    )
    def test_exponents_that_no_encoder_makes_are_refused(self, exponents):
        coded, notes = self.coded(torch.ones(2), torch.zeros(2))
        with pytest.raises(PayloadError, match="exponents"):
            self.decoded(coded, {**notes, "exponents": exponents}, torch.zeros(2))

    def test_steps_beyond_the_largest_number_are_refused(self):
        coded, notes = self.coded(torch.ones(2), torch.zeros(2))
        with pytest.raises(PayloadError, match="beyond the largest number"):
            self.decoded(coded, {**notes, "exponents": [1000]}, torch.zeros(2))

    @pytest.mark.parametrize(
        "forged",
        [
            torch.ones(2, dtype=torch.uint8),
            torch.ones(2, dtype=torch.int64),
            torch.ones(2),
            torch.tensor(1, dtype=torch.int8),
        ],
    )
    def test_symbols_that_no_encoder_makes_are_refused(self, forged):
        _, notes = self.coded(torch.ones(2), torch.zeros(2))
        with pytest.raises(PayloadError, match="symbols"):
            self.decoded({"x": forged}, notes, torch.zeros(2))

    def test_a_reference_of_another_shape_is_named(self):
        coded, notes = self.coded(torch.ones(2), torch.zeros(2))
        with pytest.raises(MismatchError, match=r"'x' is \(2,\)"):
            self.decoded(coded, notes, torch.zeros(3))
