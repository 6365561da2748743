"""Steps are rounded towards zero, whatever numpy compares in."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpara_plugins.stages.quantise_steps import StepRule


@given(st.floats(1e-20, 1e20), st.integers(2, 16))
def test_the_largest_symbol_times_its_step_is_at_most_the_peak(peak, bits):
    rows = torch.tensor([[0.0, peak]])
    (step,) = StepRule(bits, None).steps("x", rows.numpy(), rows)
    exact = Fraction(float(rows[0, 1])) / step.largest_symbol
    assert Fraction(step.size) <= exact
    assert Fraction(float(np.nextafter(np.float32(step.size), np.float32(np.inf)))) > exact
