"""Exact counts from the paper and the official notebook."""

from math import prod

import pytest

from fedpara_plugins.factors.ranks import (
    break_even_rank,
    gamma_rank,
    is_kernel,
    matched_rank,
    parameter_count,
    ratio_rank,
    smallest_full_rank,
)

VGG16 = [
    (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256),
    (512, 256), (512, 512), (512, 512), (512, 512), (512, 512), (512, 512),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "operands", "count"),
    [
        ((256, 256), 2, 16_384),
        ((256, 256, 3, 3), 2, 20_992),
        ((256, 256 * 9), 2, 81_920),
    ],
)
def test_table_1_of_the_paper(shape, operands, count):
    assert parameter_count(shape, 16, operands=operands) == count


@pytest.mark.parametrize(
    ("ratio", "count"),
    [(0.1, 60_192), (0.3, 178_050), (0.5, 296_434), (0.7, 414_792), (0.9, 533_192)],
)
def test_outputs_of_the_notebook(ratio, count):
    shape = (256, 256, 3, 3)
    assert parameter_count(shape, ratio_rank(shape, ratio)) == count


@pytest.mark.parametrize(("classes", "transferred"), [(10, 59_570), (62, 63_646)])
def test_transferred_parameters_of_the_pfedpara_mlp(classes, transferred):
    layers = [(256, 784), (classes, 256)]
    shared = sum(parameter_count(s, gamma_rank(s, 0.5), operands=1) + s[0] for s in layers)
    assert shared == transferred


@pytest.mark.parametrize(
    ("gamma", "millions"),
    [(0.1, 1.55), (0.2, 2.33), (0.3, 3.31), (0.4, 4.45), (0.5, 5.79), (0.6, 7.33), (0.7, 9.01),
     (0.8, 10.90), (0.9, 12.92)],
)  # fmt: skip
def test_table_5_of_the_paper(gamma, millions):
    """VGG16, ten classes: stem and linear layers dense, biases and norms kept."""
    dense = 64 * 3 * 9 + 512 * 512 * 2 + 512 * 10
    vectors = 3 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512) + 512 + 512 + 10
    factors = sum(parameter_count((o, i, 3, 3), gamma_rank((o, i, 3, 3), gamma)) for o, i in VGG16)
    assert (dense + vectors + factors) / 1e6 == pytest.approx(millions, abs=0.015)


@pytest.mark.parametrize("shape", [(10, 256), (512, 512), (64, 64, 3, 3), (512, 128, 5, 1)])
def test_break_even_is_the_largest_rank_that_does_not_exceed_dense(shape):
    rank = break_even_rank(shape)
    assert parameter_count(shape, rank) <= prod(shape) < parameter_count(shape, rank + 1)


def test_ends_of_gamma():
    shape = (512, 512, 3, 3)
    assert gamma_rank(shape, 0) == smallest_full_rank(shape) == 23
    assert gamma_rank(shape, 1) == break_even_rank(shape)


@pytest.mark.parametrize("shape", [(256, 784), (512, 512, 3, 3), (96, 64, 5, 3)])
def test_lowrank_is_matched_by_actual_count(shape):
    budget = parameter_count(shape, gamma_rank(shape, 0.3))
    rank = matched_rank(shape, budget, operands=1)
    gap = abs(parameter_count(shape, rank, operands=1) - budget)
    for other in (rank - 1, rank + 1):
        assert gap <= abs(parameter_count(shape, other, operands=1) - budget)


def test_rank_never_exceeds_a_side():
    assert gamma_rank((512, 4, 3, 3), 1.0) == 4


def test_1x1_kernels_are_matrices():
    assert not is_kernel((64, 32, 1, 1))
    assert is_kernel((64, 32, 1, 3))
