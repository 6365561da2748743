"""Ranks for a weight's shape and an option (gamma or ratio), and parameter counts.

A weight of shape (m, n) is a *matrix*; a weight of shape (O, I, k1, ...) with more than one kernel
element is a *kernel*. An operand of rank R holds X (m, R) and Y (n, R), and for a kernel also the
core T (R, R, k1, ...). FedPara and pFedPara multiply two operands elementwise; low-rank has one.
The functions are plain arithmetic on shapes, without tensors or state.
"""

from __future__ import annotations

from math import ceil, floor, isqrt, prod, sqrt

__all__ = [
    "break_even_rank",
    "gamma_rank",
    "is_kernel",
    "matched_rank",
    "parameter_count",
    "ratio_rank",
    "smallest_full_rank",
    "smallest_ratio",
]

Shape = tuple[int, ...]


def is_kernel(shape: Shape) -> bool:
    """Return whether a weight has spatial extent.

    1x1 kernels count as matrices: a core would only add cost.
    """
    return prod(shape[2:]) > 1


def parameter_count(shape: Shape, rank: int, *, operands: int = 2) -> int:
    """Return the number of factor entries (paper, Table 1).

    With two operands it is 2R(m+n) for a matrix and 2R(O+I) + 2R²k1k2 for a kernel.
    """
    core = rank * rank * prod(shape[2:]) if is_kernel(shape) else 0
    return operands * (rank * (shape[0] + shape[1]) + core)


def smallest_full_rank(shape: Shape) -> int:
    """Return r_min, the smallest R with R² >= min(m, n), which allows full rank (Corollary 1)."""
    return min(_ceil_sqrt(shape[0]), _ceil_sqrt(shape[1]))


def break_even_rank(shape: Shape) -> int:
    """Return r_max, the largest R whose two operands hold no more entries than the dense weight."""
    return floor(_real_rank(shape, prod(shape) / 2))


def gamma_rank(shape: Shape, gamma: float) -> int:
    """Return the rank of the paper's rule: (1-gamma) r_min + gamma r_max, gamma in [0, 1].

    The paper leaves the rounding open. Rounding to nearest reproduces its Table 5 best.
    """
    low, high = smallest_full_rank(shape), break_even_rank(shape)
    return _cap(shape, round((1 - gamma) * low + gamma * high))


def ratio_rank(shape: Shape, ratio: float) -> int:
    """Return the rank of the official notebook's rule: ``ratio`` of the dense entries or more.

    r = max(ceil sqrt m, ceil sqrt n, ceil(r')), where r' solves count(r') = ratio * dense count.
    The first two terms keep full rank possible. Where one of them decides, the ratio cannot be
    reached; see `smallest_ratio`.
    """
    wanted = ceil(_real_rank(shape, ratio * prod(shape) / 2))
    return max(_ratio_floor(shape), _cap(shape, wanted))


def smallest_ratio(shape: Shape, ratio: float, *, operands: int = 2) -> float | None:
    """Return the smallest reachable share of the dense entries; None if ``ratio`` is reachable.

    With two operands the rank is at least the notebook's full-rank minimum. ``ratio`` counts as
    reached if that minimum does not exceed r' rounded up. (Rounding up alone exceeds the ratio: the
    notebook's five outputs, none of them at the minimum, hold up to 0.4 % of the dense entries more
    than asked for.) Other numbers of operands have no such minimum and go down to rank 1, with a
    tolerance of 10 %.
    """
    low = _ratio_floor(shape) if operands == 2 else 1
    wanted = _real_rank(shape, ratio * prod(shape) / operands)
    if low <= (ceil(wanted) if low > 1 else wanted * 1.1):
        return None
    return parameter_count(shape, low, operands=operands) / prod(shape)


def _ratio_floor(shape: Shape) -> int:
    return _cap(shape, max(_ceil_sqrt(shape[0]), _ceil_sqrt(shape[1])))


def matched_rank(shape: Shape, budget: int, *, operands: int) -> int:
    """Return the rank whose ``operands`` operands hold nearest to ``budget`` entries."""
    low = max(1, floor(_real_rank(shape, budget / operands)))
    gaps = {r: abs(parameter_count(shape, r, operands=operands) - budget) for r in (low, low + 1)}
    return _cap(shape, min(gaps, key=lambda r: (gaps[r], r)))


def _real_rank(shape: Shape, entries: float) -> float:
    """Solve for the positive real r at which one operand holds ``entries`` entries."""
    sides = shape[0] + shape[1]
    if not is_kernel(shape):
        return entries / sides
    kernel = prod(shape[2:])
    # This form of the root subtracts no two nearly equal numbers.
    return 2 * entries / (sides + sqrt(sides * sides + 4 * kernel * entries))


def _cap(shape: Shape, rank: int) -> int:
    """Limit a rank to min(O, I), as Proposition 3 requires; an operand gains nothing beyond it."""
    return min(rank, shape[0], shape[1])


def _ceil_sqrt(n: int) -> int:
    return isqrt(n - 1) + 1 if n > 0 else 0
