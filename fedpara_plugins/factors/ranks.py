"""From a weight's shape and a wish (gamma, ratio or rank) to a rank; and parameter counts.

A weight of shape (m, n) is a *matrix*, one of shape (O, I, k1, ...) with more than one kernel
element a *kernel*. An operand of rank R holds X (m, R) and Y (n, R), and for a kernel also the
core T (R, R, k1, ...). FedPara and pFedPara multiply two operands elementwise; low-rank has one.
Everything here is plain integer arithmetic on shapes: no tensors, no state.
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
    """Whether a weight has spatial extent. 1x1 kernels are matrices: a core would only add cost."""
    return prod(shape[2:]) > 1


def parameter_count(shape: Shape, rank: int, *, operands: int = 2) -> int:
    """Number of factor entries (paper, Table 1).

    2R(m+n) for a matrix and 2R(O+I) + 2R²k1k2 for a kernel when there are two operands.
    """
    core = rank * rank * prod(shape[2:]) if is_kernel(shape) else 0
    return operands * (rank * (shape[0] + shape[1]) + core)


def smallest_full_rank(shape: Shape) -> int:
    """r_min: the smallest R with R² >= min(m, n), so that W can have full rank (Corollary 1)."""
    return min(_ceil_sqrt(shape[0]), _ceil_sqrt(shape[1]))


def break_even_rank(shape: Shape) -> int:
    """r_max: the largest R whose two operands hold no more entries than the dense weight."""
    return floor(_real_rank(shape, prod(shape) / 2))


def gamma_rank(shape: Shape, gamma: float) -> int:
    """The paper's rule r = (1-gamma) r_min + gamma r_max, rounded to nearest, gamma in [0, 1].

    The paper leaves the rounding open; to nearest reproduces its Table 5 best.
    """
    low, high = smallest_full_rank(shape), break_even_rank(shape)
    return _cap(shape, round((1 - gamma) * low + gamma * high))


def ratio_rank(shape: Shape, ratio: float) -> int:
    """The official notebook's rule: at least ``ratio`` of the dense entries, and full rank.

    r = max(ceil sqrt m, ceil sqrt n, ceil(r')), where r' solves count(r') = ratio * dense count.
    Where the first two decide, the ratio cannot be reached: see `smallest_ratio`.
    """
    wanted = ceil(_real_rank(shape, ratio * prod(shape) / 2))
    return max(_ratio_floor(shape), _cap(shape, wanted))


def smallest_ratio(shape: Shape, ratio: float, *, operands: int = 2) -> float | None:
    """The least share of the dense entries that the method can hold; None if that meets ``ratio``.

    With two operands the rank is at least the notebook's full-rank minimum, and ``ratio`` is met if
    that minimum is no more than what rounding r' up gives anyway (the notebook's five outputs, of
    which none stands at the minimum, hold up to 0.4 % of the dense entries more than asked). Other
    numbers of operands have no such minimum and can go down to rank 1, give or take 10 %.
    """
    low = _ratio_floor(shape) if operands == 2 else 1
    wanted = _real_rank(shape, ratio * prod(shape) / operands)
    if low <= (ceil(wanted) if low > 1 else wanted * 1.1):
        return None
    return parameter_count(shape, low, operands=operands) / prod(shape)


def _ratio_floor(shape: Shape) -> int:
    return _cap(shape, max(_ceil_sqrt(shape[0]), _ceil_sqrt(shape[1])))


def matched_rank(shape: Shape, budget: int, *, operands: int) -> int:
    """The rank whose count with ``operands`` operands is nearest to ``budget`` entries."""
    low = max(1, floor(_real_rank(shape, budget / operands)))
    gaps = {r: abs(parameter_count(shape, r, operands=operands) - budget) for r in (low, low + 1)}
    return _cap(shape, min(gaps, key=lambda r: (gaps[r], r)))


def _real_rank(shape: Shape, entries: float) -> float:
    """The positive real r at which one operand holds ``entries`` entries."""
    sides = shape[0] + shape[1]
    if not is_kernel(shape):
        return entries / sides
    kernel = prod(shape[2:])
    # In this form of the root no two nearly equal numbers are subtracted.
    return 2 * entries / (sides + sqrt(sides * sides + 4 * kernel * entries))


def _cap(shape: Shape, rank: int) -> int:
    """Proposition 3 asks for R <= min(O, I); beyond it an operand gains nothing."""
    return min(rank, shape[0], shape[1])


def _ceil_sqrt(n: int) -> int:
    return isqrt(n - 1) + 1 if n > 0 else 0
