r"""What small movements of a weight's factors do to the weight: its Jacobian J, never written out.

A weight is s * combine(operands), with operand = X M and M = Yᵀ for a matrix, or the core's second
side multiplied with Y for a kernel. Methods combine elementwise, so to first order

.. math:: J d = \sum_i S_i \circ (dX_i M_i + X_i dM_i)

with S_i the elementwise derivative of the weight by operand i (gain, scale and tanh included). For
FedPara S_1 is the second operand and S_2 the first; for pFedPara S_1 = W2 + 1 and S_2 = W1, and
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
    """One operand at the point of the tangent.

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
        plan: of the weight.
        factors: all of them, in one floating dtype.
    """

    def __init__(self, plan: WeightPlan, factors: Mapping[str, Tensor]) -> None:
        self._operands: list[_Operand] = []
        slopes = _slopes(plan, factors)
        for i, slope in enumerate(slopes, start=1):
            x, y, t = factors[f"x{i}"], factors[f"y{i}"], factors.get(f"t{i}")
            right = y.T if t is None else core_product(y, t)
            self._operands.append(_Operand(i, x, y, t, right, slope))

    def push(self, moves: Mapping[str, Tensor]) -> Tensor:
        """J d: the weight's movement to first order, shape (m, n k1 ...).

        Args:
            moves: of all factors, with their shapes.
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

    def pull(self, values: Tensor) -> Factors:
        """Jᵀ V: the gradient of <J d, V> by d.

        Args:
            values: V, shape (m, n k1 ...).
        """
        moves: Factors = {}
        for part in self._operands:
            seen = part.slope * values
            moves[f"x{part.number}"] = seen @ part.right.T
            left = part.x.T @ seen  # (R, n k1 ...), the gradient by M
            if part.t is None:
                moves[f"y{part.number}"] = left.T
            else:
                dy, dt = _through_core(left, part.y, part.t)
                moves[f"y{part.number}"], moves[f"t{part.number}"] = dy, dt
        return moves

    def preconditioner(self) -> Callable[[Mapping[str, Tensor]], Factors]:
        """An approximate inverse of JᵀJ, block by block: what one factor does alone.

        With the other factor's side F fixed, a factor's block of JᵀJ has for each of its rows the
        matrix Fᵀ diag(S² of that row) F. Here all rows share one, with the mean of S² over them;
        a core has one on each of its sides.
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
            # S² is taken for a product of a row's and a column's share, (m) and (n).
            ours, theirs = square.mean(1), by_column.view(n, -1).mean(1)
            inverses[f"t{part.number}"] = (
                _inverse_gram(part.x, ours),
                _inverse_gram(part.y, theirs / mean if mean > 0 else theirs),
            )

        def apply(moves: Mapping[str, Tensor]) -> Factors:
            return {name: _sided(moves[name], *sides) for name, sides in inverses.items()}

        return apply


def _slopes(plan: WeightPlan, factors: Mapping[str, Tensor]) -> list[Tensor]:
    """S of every operand, shape (m, n k1 ...)."""
    inner = []
    for i, gain in enumerate(plan.gains, start=1):
        value = operand(factors[f"x{i}"], factors[f"y{i}"], factors.get(f"t{i}")) * gain
        inner.append(torch.tanh(value) if plan.tanh else value)
    with torch.enable_grad():
        # Combining is elementwise: the gradient of the sum is the derivative of every entry.
        values = [value.detach().requires_grad_() for value in inner]
        found = torch.autograd.grad(plan.method.combine(values).sum(), values, allow_unused=True)
    slopes = []
    for gain, value, slope in zip(plan.gains, inner, found, strict=True):
        whole = torch.zeros_like(value) if slope is None else slope * (gain * plan.outer)
        slopes.append((whole * (1 - value.square()) if plan.tanh else whole).flatten(1))
    return slopes


def _through_core(left: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by Y and by the core, from the one by M = core times Y, (R, n k1 ...)."""
    rank, other = t.shape[:2]
    of_m = left.view(rank, y.shape[0], -1)  # (R, n, k)
    core = t.flatten(2)  # (R, R, k)
    dt = of_m.transpose(1, 2).reshape(-1, y.shape[0]) @ y  # (R k, R)
    dt = dt.view(rank, -1, other).transpose(1, 2).reshape(t.shape)
    dy = of_m.transpose(0, 1).reshape(y.shape[0], -1)  # (n, R k)
    return dy @ core.transpose(1, 2).reshape(-1, other), dt


RIDGE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Of the mean eigenvalue: directions that a side does not have (factors of lower rank) would
otherwise be blown up from rounding noise to anything."""


def _inverse_gram(side: Tensor, weights: Tensor) -> Tensor:
    """(Fᵀ diag(w) F)^-1, shape (R, R); zero where there is nothing to invert."""
    exact = side.to(torch.float64)
    gram = exact.T @ (exact * weights.to(torch.float64).unsqueeze(1))
    size = gram.diagonal().mean()
    if not size > 0:
        return torch.zeros_like(gram, dtype=side.dtype)
    gram = gram / size
    gram.diagonal().add_(RIDGE[side.dtype])
    return (torch.cholesky_inverse(torch.linalg.cholesky(gram)) / size).to(side.dtype)


def _sided(move: Tensor, *sides: Tensor) -> Tensor:
    """A movement of X or Y times one matrix, or of a core times one on each side."""
    if len(sides) == 1:
        return move @ sides[0]
    ours, theirs = sides
    rank = move.shape[0]
    first = (ours @ move.flatten(1)).view(rank, theirs.shape[0], -1)
    return (first.transpose(1, 2) @ theirs).transpose(1, 2).reshape(move.shape)
