r"""The Jacobian J of a weight by its factors, as products with vectors; J is never written out.

A weight is s * combine(operands), with operand = X M, where M = Yᵀ for a matrix, or the core's
second side multiplied by Y for a kernel. Methods combine elementwise, so to first order

.. math:: J d = \sum_i S_i \circ (dX_i M_i + X_i dM_i)

where S_i is the elementwise derivative of the weight by operand i (gain, scale and tanh included).
For FedPara S_1 is the second operand and S_2 the first; for pFedPara S_1 = W2 + 1 and S_2 = W1, and
both halves move. Every product here has the inner size R or 2 R.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpara_plugins.factors.compose import core_product, operand
from fedpara_plugins.factors.plan import WeightPlan

__all__ = ["Factors", "Tangent"]

Factors = dict[str, Tensor]
"""Factors, or movements of factors, by their names."""


@dataclass(frozen=True)
class _Operand:
    """One operand at the factors where J is taken.

    Attributes:
        number: 1, 2, ...
        x: (m, R).
        y: (n, R).
        t: (R, R, k1, ...), or None for a matrix.
        right: M, shape (R, n k1 ...).
        slope: S, shape (m, n k1 ...).
    """

    number: int
    x: Tensor
    y: Tensor
    t: Tensor | None
    right: Tensor
    slope: Tensor


class Tangent:
    """J and its transpose at some factors of one weight.

    Args:
        plan: the weight's plan.
        factors: all factors by name, in one floating dtype.
    """

    def __init__(self, plan: WeightPlan, factors: Mapping[str, Tensor]) -> None:
        self._operands: list[_Operand] = []
        slopes = _slopes(plan, factors)
        for i, slope in enumerate(slopes, start=1):
            x, y, t = factors[f"x{i}"], factors[f"y{i}"], factors.get(f"t{i}")
            right = y.T if t is None else core_product(y, t)
            self._operands.append(_Operand(i, x, y, t, right, slope))

    def jvp(self, moves: Mapping[str, Tensor]) -> Tensor:
        """Return J d, the weight's movement to first order, shape (m, n k1 ...).

        Args:
            moves: d, a movement of each factor, of the factor's shape.
        """
        total: Tensor | None = None
        for part in self._operands:
            dx, dy = moves[f"x{part.number}"], moves[f"y{part.number}"]
            if part.t is None:
                right = dy.T
            else:
                right = core_product(dy, part.t)
                right = right + core_product(part.y, moves[f"t{part.number}"])
            # Both terms in one product of inner size 2R.
            moved = torch.cat([dx, part.x], dim=1) @ torch.cat([part.right, right])
            moved *= part.slope
            total = moved if total is None else total.add_(moved)
        assert total is not None
        return total

    def vjp(self, values: Tensor) -> Factors:
        """Return Jᵀ V, the gradient of <J d, V> by d.

        Args:
            values: V, shape (m, n k1 ...).
        """
        gradients: Factors = {}
        for part in self._operands:
            d_product = part.slope * values
            gradients[f"x{part.number}"] = d_product @ part.right.T
            dm = part.x.T @ d_product  # (R, n k1 ...)
            if part.t is None:
                gradients[f"y{part.number}"] = dm.T
            else:
                dy, dt = _through_core(dm, part.y, part.t)
                gradients[f"y{part.number}"], gradients[f"t{part.number}"] = dy, dt
        return gradients

    def preconditioner(self) -> Callable[[Mapping[str, Tensor]], Factors]:
        """Return an approximate inverse of JᵀJ that treats each factor alone, as one block.

        With the other factors fixed, as a matrix F, a factor's block of JᵀJ has for each of its
        rows the matrix Fᵀ diag(S² of that row) F. Here all rows share one matrix, with the mean of
        S² over the rows; a core has one matrix on each of its sides.
        """
        inverses: dict[str, tuple[Tensor, ...]] = {}
        for part in self._operands:
            square = part.slope.square()
            n = part.y.shape[0]
            by_column = square.mean(0)  # (n k1 ...)
            inverses[f"x{part.number}"] = (_inverse_gram(part.right.T, by_column),)
            if part.t is None:
                inverses[f"y{part.number}"] = (_inverse_gram(part.x, square.mean(1)),)
                continue
            core = part.t.flatten(2)  # (R, R, k)
            left = (part.x @ core.flatten(1)).view(-1, core.shape[1], core.shape[2])
            rows = left.transpose(1, 2).flatten(0, 1)  # (m k, R)
            by_row = square.view(len(part.x), n, -1).mean(1).flatten()  # (m k)
            inverses[f"y{part.number}"] = (_inverse_gram(rows, by_row),)
            mean = square.mean()
            # S² is approximated by the product of a row's and a column's share, (m) and (n).
            row_share, column_share = square.mean(1), by_column.view(n, -1).mean(1)
            inverses[f"t{part.number}"] = (
                _inverse_gram(part.x, row_share),
                _inverse_gram(part.y, column_share / mean if mean > 0 else column_share),
            )

        def apply(moves: Mapping[str, Tensor]) -> Factors:
            return {name: _multiplied(moves[name], *sides) for name, sides in inverses.items()}

        return apply


def _slopes(plan: WeightPlan, factors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return S of every operand, shape (m, n k1 ...)."""
    inner = []
    for i, gain in enumerate(plan.gains, start=1):
        value = operand(factors[f"x{i}"], factors[f"y{i}"], factors.get(f"t{i}")) * gain
        inner.append(torch.tanh(value) if plan.tanh else value)
    with torch.enable_grad():
        # Combining is elementwise, so the gradient of the sum is the derivative of every entry.
        values = [value.detach().requires_grad_() for value in inner]
        found = torch.autograd.grad(plan.method.combine(values).sum(), values, allow_unused=True)
    slopes = []
    for gain, value, slope in zip(plan.gains, inner, found, strict=True):
        whole = torch.zeros_like(value) if slope is None else slope * (gain * plan.outer)
        slopes.append((whole * (1 - value.square()) if plan.tanh else whole).flatten(1))
    return slopes


def _through_core(dm: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by Y and by the core from that by M = core times Y, (R, n k1 ...)."""
    rank, other = t.shape[:2]
    of_m = dm.view(rank, y.shape[0], -1)  # (R, n, k)
    core = t.flatten(2)  # (R, R, k)
    dt = of_m.transpose(1, 2).reshape(-1, y.shape[0]) @ y  # (R k, R)
    dt = dt.view(rank, -1, other).transpose(1, 2).reshape(t.shape)
    dy = of_m.transpose(0, 1).reshape(y.shape[0], -1)  # (n, R k)
    return dy @ core.transpose(1, 2).reshape(-1, other), dt


RIDGE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Regularisation by dtype, relative to the mean eigenvalue. Without it, rounding noise would grow
without bound in directions that a factor of lower rank does not have."""


def _inverse_gram(side: Tensor, weights: Tensor) -> Tensor:
    """Return (Fᵀ diag(w) F)^-1, shape (R, R); zero if the matrix is zero."""
    exact = side.to(torch.float64)
    gram = exact.T @ (exact * weights.to(torch.float64).unsqueeze(1))
    size = gram.diagonal().mean()
    if not size > 0:
        return torch.zeros_like(gram, dtype=side.dtype)
    gram = gram / size
    gram.diagonal().add_(RIDGE[side.dtype])
    return (torch.cholesky_inverse(torch.linalg.cholesky(gram)) / size).to(side.dtype)


def _multiplied(move: Tensor, *sides: Tensor) -> Tensor:
    """Multiply a movement of X or Y by one matrix, or that of a core by one on each side."""
    if len(sides) == 1:
        return move @ sides[0]
    left, right = sides
    rank = move.shape[0]
    first = (left @ move.flatten(1)).view(rank, right.shape[0], -1)
    return (first.transpose(1, 2) @ right).transpose(1, 2).reshape(move.shape)
